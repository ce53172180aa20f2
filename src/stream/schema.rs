//! JSON Schemas that the messages of actions must fit.
//!
//! Source: JSON Schema, drafts 4 to 2020-12 (the newest where `$schema` names none), by `boon`. Its patterns take linear
//! time; it is given nothing to fetch other schemas with, so that a `$ref` beyond the text is an error at start.
//! Memory: a schema's text and what it is compiled to, once a configuration; a message is parsed while it is looked at.
//! Errors: [`SchemaError`] is the operator's fault, [`Misfit`] the caller's. A misfit names places, never values.
//! Not here: what is done with a message that fits (`stream::action`).

use std::error::Error;
use std::fmt;

use boon::{CompileError, Compiler, Draft, ErrorKind, SchemaIndex, Schemas, UrlLoader, ValidationError};
use serde_json::Value;

use crate::limits::{ACTION_SCHEMA_BYTES_MAX, ACTION_SCHEMA_DEPTH_MAX};

/// Characters of an error's text; what a schema or a message calls its members has no other bound.
const TEXT_CHARS_MAX: usize = 200;
/// References that are followed to learn whether a schema names a member.
const REFERENCES_FOLLOWED_MAX: usize = 16;
/// What the schema's text is called while it is compiled.
const PLACE: &str = "schema:action";

/// A schema, compiled. `Debug` shows its size.
pub struct Schema {
    text: String,
    compiled: Schemas,
    root: SchemaIndex,
    /// Whether it names `type` and `id`, which are the frame's own and are not shown to it otherwise.
    names_type: bool,
    names_id: bool,
}

/// Why a text is no schema.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SchemaError {
    /// Over its bound.
    #[error("is over {ACTION_SCHEMA_BYTES_MAX} bytes")]
    TooLong,
    /// Not JSON.
    #[error("is not JSON: {0}")]
    NotJson(String),
    /// JSON, and no schema.
    #[error("is not a JSON Schema: {0}")]
    NotASchema(String),
}

/// Why a message does not fit, for the one who sent it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct Misfit(String);

/// Where other schemas are fetched from: nowhere.
struct Nowhere;

impl UrlLoader for Nowhere {
    fn load(&self, _: &str) -> Result<Value, Box<dyn Error>> {
        Err("a $ref may only lead to places within the schema itself".into())
    }
}

impl Schema {
    /// Reads and compiles `text`.
    ///
    /// # Errors
    /// [`SchemaError`].
    pub fn parse(text: &str) -> Result<Schema, SchemaError> {
        if text.len() > ACTION_SCHEMA_BYTES_MAX {
            return Err(SchemaError::TooLong);
        }
        let json: Value = serde_json::from_str(text).map_err(|error| SchemaError::NotJson(error.to_string()))?;
        if !json.is_object() && !json.is_boolean() {
            return Err(SchemaError::NotASchema("write an object".to_owned()));
        }
        let (names_type, names_id) = (names(&json, &json, "type", &mut vec![]), names(&json, &json, "id", &mut vec![]));
        let mut compiler = Compiler::new();
        compiler.set_default_draft(Draft::V2020_12);
        compiler.use_loader(Box::new(Nowhere));
        let mut compiled = Schemas::new();
        let unusable = |error: CompileError| SchemaError::NotASchema(one_line(&format!("{error:#}")));
        compiler.add_resource(PLACE, json).map_err(unusable)?;
        let root = compiler.compile(PLACE, &mut compiled).map_err(unusable)?;
        Ok(Schema { text: text.to_owned(), compiled, root, names_type, names_id })
    }

    /// The text it was read from.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the message of that text, which is a JSON object, fits. Its `type` and `id` are left out unless the schema, or
    /// one that it applies to the whole message (`allOf`, `$ref` …), names them among its `properties` or as `required`.
    ///
    /// # Errors
    /// The first place that does not fit.
    pub fn check(&self, message: &str) -> Result<(), Misfit> {
        if depth(message) > ACTION_SCHEMA_DEPTH_MAX {
            return Err(Misfit(format!("the message is nested over {ACTION_SCHEMA_DEPTH_MAX} deep")));
        }
        let unread = |_| Misfit("the message holds a number beyond what a schema is checked against".to_owned());
        let mut message: Value = serde_json::from_str(message).map_err(unread)?;
        if let Value::Object(members) = &mut message {
            if !self.names_type {
                members.remove("type");
            }
            if !self.names_id {
                members.remove("id");
            }
        }
        self.compiled.validate(&message, self.root).map_err(|error| misfit(&error))
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schema({} bytes)", self.text.len())
    }
}

impl PartialEq for Schema {
    fn eq(&self, other: &Schema) -> bool {
        self.text == other.text
    }
}

/// Whether a schema says something of that member of what it is asked about: itself, or by one that it applies to the same
/// place. `followed`: the references that have been followed.
fn names<'s>(schema: &'s Value, root: &'s Value, member: &str, followed: &mut Vec<&'s str>) -> bool {
    if names_itself(schema, member) {
        return true;
    }
    let lists = ["allOf", "anyOf", "oneOf"].into_iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
    let single = ["not", "if", "then", "else"].into_iter().filter_map(|key| schema.get(key));
    let dependent = ["dependentSchemas", "dependencies"].into_iter().filter_map(|key| schema.get(key)?.as_object());
    let mut applied = lists.chain(single).chain(dependent.flat_map(|schemas| schemas.values()));
    if applied.any(|inner| names(inner, root, member, followed)) {
        return true;
    }
    let led_to = ["$ref", "$dynamicRef", "$recursiveRef"].into_iter().filter_map(|key| schema.get(key)?.as_str());
    for reference in led_to {
        if followed.contains(&reference) {
            continue;
        }
        let place = reference.strip_prefix('#').and_then(|place| root.pointer(place));
        let named = match place.filter(|_| followed.len() < REFERENCES_FOLLOWED_MAX) {
            Some(inner) => {
                followed.push(reference);
                names(inner, root, member, followed)
            }
            // It leads to an anchor, or there are very many: what is named anywhere may be meant.
            None => names_anywhere(root, member),
        };
        if named {
            return true;
        }
    }
    false
}

fn names_itself(schema: &Value, member: &str) -> bool {
    let listed = schema.get("required").and_then(Value::as_array);
    schema.get("properties").and_then(|properties| properties.get(member)).is_some()
        || listed.is_some_and(|listed| listed.iter().any(|name| name == member))
}

fn names_anywhere(json: &Value, member: &str) -> bool {
    let within = match json {
        Value::Array(elements) => elements.iter().any(|element| names_anywhere(element, member)),
        Value::Object(members) => members.values().any(|value| names_anywhere(value, member)),
        _ => false,
    };
    within || names_itself(json, member)
}

/// The innermost cause, up to where there are several ways to fit.
fn misfit(error: &ValidationError<'_, '_>) -> Misfit {
    let mut cause = error;
    while let (false, Some(inner)) = (is_choice(&cause.kind), cause.causes.first()) {
        cause = inner;
    }
    let place = match cause.instance_location.to_string() {
        root if root.is_empty() => "the message".to_owned(),
        place => format!("the message's {}", one_line(&place)),
    };
    Misfit(format!("{place} does not fit this action: {}", one_line(&demand(&cause.kind))))
}

fn is_choice(kind: &ErrorKind<'_, '_>) -> bool {
    matches!(kind, ErrorKind::AnyOf | ErrorKind::OneOf(_) | ErrorKind::Not | ErrorKind::Contains)
}

/// What the schema asks for, by its own words: nothing of the message.
fn demand(kind: &ErrorKind<'_, '_>) -> String {
    let listed = |names: &[&str]| names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    match kind {
        ErrorKind::Type { want, .. } => {
            format!("it must be {}", want.iter().map(|kind| kind.to_string()).collect::<Vec<_>>().join(" or "))
        }
        ErrorKind::Required { want } => format!("it must have {}", listed(want)),
        ErrorKind::Dependency { missing, .. } | ErrorKind::DependentRequired { missing, .. } => {
            format!("it must have {}", listed(missing))
        }
        ErrorKind::AdditionalProperties { .. } => "it has a member that is not known".to_owned(),
        ErrorKind::Minimum { want, .. } => format!("it must be at least {want}"),
        ErrorKind::Maximum { want, .. } => format!("it must be at most {want}"),
        ErrorKind::ExclusiveMinimum { want, .. } => format!("it must be over {want}"),
        ErrorKind::ExclusiveMaximum { want, .. } => format!("it must be under {want}"),
        ErrorKind::MultipleOf { want, .. } => format!("it must be a multiple of {want}"),
        ErrorKind::MinLength { want, .. } => format!("it must have at least {want} characters"),
        ErrorKind::MaxLength { want, .. } => format!("it must have at most {want} characters"),
        ErrorKind::MinItems { want, .. } => format!("it must have at least {want} elements"),
        ErrorKind::MaxItems { want, .. } => format!("it must have at most {want} elements"),
        ErrorKind::MinProperties { want, .. } => format!("it must have at least {want} members"),
        ErrorKind::MaxProperties { want, .. } => format!("it must have at most {want} members"),
        ErrorKind::UniqueItems { .. } => "its elements must differ".to_owned(),
        ErrorKind::Enum { .. } | ErrorKind::Const { .. } => "it must be one of the values allowed".to_owned(),
        ErrorKind::Pattern { .. } => "it must match a pattern".to_owned(),
        ErrorKind::Format { want, .. } => format!("it must be of the format {want}"),
        _ => "it is none of what the schema allows".to_owned(),
    }
}

/// How many arrays and objects of JSON text stand within each other at most.
fn depth(json: &str) -> usize {
    let (mut deep, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                deep += 1;
                deepest = deepest.max(deep);
            }
            b'}' | b']' if !in_string => deep = deep.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn one_line(text: &str) -> String {
    let mut line: String = text.chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() < text.len() {
        line.push('…');
    }
    line
}

// It stands in the options that all cores share.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Schema>();
};

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, proptest};

    use super::*;

    fn schema(text: &str) -> Schema {
        Schema::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn reason(schema: &Schema, message: &str) -> String {
        schema.check(message).expect_err(message).to_string()
    }

    const PRICE: &str = r#"{
        "type": "object",
        "required": ["property"],
        "properties": {
            "property": {
                "type": "object",
                "required": ["id", "price"],
                "properties": {
                    "id": { "type": "integer", "minimum": 1 },
                    "price": { "type": "number", "exclusiveMinimum": 0 },
                    "name": { "type": "string", "maxLength": 5, "pattern": "^[a-z]*$" },
                    "kind": { "enum": ["house", "flat"] },
                    "owner": { "anyOf": [{ "type": "string" }, { "type": "null" }] }
                },
                "additionalProperties": false
            }
        },
        "additionalProperties": false
    }"#;

    #[test]
    fn a_message_that_does_not_fit_is_told_where_and_not_what() {
        let schema = schema(PRICE);
        let of = |property: &str| format!(r#"{{"type":"update","id":9,"property":{property}}}"#);
        assert_eq!(schema.check(&of(r#"{"id":1,"price":0.5,"name":"abc","kind":"flat","owner":null}"#)), Ok(()));
        for (property, told) in [
            (r#"{"id":1}"#, "the message's /property does not fit this action: it must have \"price\""),
            (r#"{"id":"1","price":1}"#, "the message's /property/id does not fit this action: it must be integer"),
            (r#"{"id":0,"price":1}"#, "the message's /property/id does not fit this action: it must be at least 1"),
            (r#"{"id":1,"price":0}"#, "the message's /property/price does not fit this action: it must be over 0"),
            (
                r#"{"id":1,"price":1,"name":"secret"}"#,
                "the message's /property/name does not fit this action: it must have at most 5 characters",
            ),
            (
                r#"{"id":1,"price":1,"name":"S"}"#,
                "the message's /property/name does not fit this action: it must match a pattern",
            ),
            (
                r#"{"id":1,"price":1,"kind":"secret"}"#,
                "the message's /property/kind does not fit this action: it must be one of the values allowed",
            ),
            (
                r#"{"id":1,"price":1,"owner":7}"#,
                "the message's /property/owner does not fit this action: it is none of what the schema allows",
            ),
            (
                r#"{"id":1,"price":1,"secret":7}"#,
                "the message's /property does not fit this action: it has a member that is not known",
            ),
        ] {
            assert_eq!(reason(&schema, &of(property)), told);
        }
        assert_eq!(
            reason(&schema, r#"{"type":"update"}"#),
            "the message does not fit this action: it must have \"property\""
        );
        let long = format!(r#"{{"property":{{"id":1,"price":1}},"{}":1}}"#, "x".repeat(60_000));
        assert!(reason(&schema, &long).len() < 300);
    }

    #[test]
    fn the_frames_own_members_are_shown_to_a_schema_that_names_them() {
        let closed = schema(r#"{"properties":{"a":true},"additionalProperties":false}"#);
        assert_eq!(closed.check(r#"{"type":"t","id":1,"a":1}"#), Ok(()));
        let by_id =
            schema(r#"{"properties":{"id":{"type":"integer"}},"required":["id"],"additionalProperties":false}"#);
        assert_eq!(by_id.check(r#"{"type":"t","id":1}"#), Ok(()));
        assert_eq!(reason(&by_id, r#"{"type":"t"}"#), "the message does not fit this action: it must have \"id\"");
        assert!(reason(&by_id, r#"{"type":"t","id":"a"}"#).contains("/id does not fit"));
        let both = schema(r#"{"required":["type","id"]}"#);
        assert_eq!(both.check(r#"{"type":"t","id":1}"#), Ok(()));
    }

    #[test]
    fn a_schema_that_names_the_frames_own_members_by_way_of_others_is_shown_them() {
        let id = r#""properties":{"id":{"type":"integer"}}"#;
        for text in [
            format!(r#"{{"allOf":[{{{id}}}]}}"#),
            format!(r#"{{"anyOf":[{{{id},"required":["id"]}},{{"required":["name"]}}]}}"#),
            format!(r#"{{"if":{{"required":["n"]}},"else":{{"oneOf":[{{{id}}}]}}}}"#),
            format!(r##"{{"$ref":"#/$defs/a","$defs":{{"a":{{"$ref":"#/$defs/b"}},"b":{{"allOf":[{{{id}}}]}}}}}}"##),
            format!(r##"{{"$ref":"#it","$defs":{{"a":{{"$anchor":"it",{id}}}}}}}"##),
            format!(r#"{{"dependentSchemas":{{"a":{{{id}}}}}}}"#),
        ] {
            let schema = schema(&text);
            assert_eq!(schema.check(r#"{"type":"t","id":1,"a":1}"#), Ok(()), "{text}");
            assert!(schema.check(r#"{"type":"t","id":"../1","a":1}"#).is_err(), "{text}");
        }
        // What stands deeper is another's.
        let nested = schema(
            r##"{"properties":{"p":{"$ref":"#/$defs/p"}},"additionalProperties":false,"$defs":{"p":{"required":["id"]}}}"##,
        );
        assert_eq!(nested.check(r#"{"type":"t","id":"x","p":{"id":1}}"#), Ok(()));
        assert!(nested.check(r#"{"type":"t","id":"x","p":{}}"#).is_err());
        let around = schema(r##"{"allOf":[{"$ref":"#"}]}"##);
        assert!(!around.names_id && !around.names_type);
        let chain: Vec<String> = (0..200).map(|n| format!(r##""d{n}":{{"$ref":"#/$defs/d{}"}}"##, n + 1)).collect();
        let long = format!(r##"{{"$ref":"#/$defs/d0","$defs":{{{},"d200":{{{id}}}}}}}"##, chain.join(","));
        assert!(schema(&long).check(r#"{"id":"x"}"#).is_err());
    }

    #[test]
    fn what_is_no_schema_is_refused_at_start() {
        let refused = |text: &str| Schema::parse(text).expect_err(text);
        assert!(matches!(refused("{"), SchemaError::NotJson(_)));
        assert!(matches!(refused(""), SchemaError::NotJson(_)));
        for text in [
            "[]",
            "1",
            r#"{"type":"strange"}"#,
            r#"{"type":7}"#,
            r#"{"pattern":"("}"#,
            r#"{"$ref":"other.json"}"#,
            r#"{"$ref":"https://schemas.example/a.json"}"#,
            r##"{"$ref":"#/$defs/missing"}"##,
            r#"{"$ref":"file:///etc/hostname"}"#,
            r#"{"minimum":"1"}"#,
            r#"{"$schema":"https://schemas.example/mine"}"#,
        ] {
            let error = refused(text);
            assert!(matches!(error, SchemaError::NotASchema(_)), "{text}: {error}");
            assert!(!error.to_string().contains('\n') && error.to_string().len() < 800, "{text}: {error}");
        }
        let padded = |bytes: usize| format!("{{}}{}", " ".repeat(bytes - 2));
        assert!(Schema::parse(&padded(ACTION_SCHEMA_BYTES_MAX)).is_ok());
        assert_eq!(refused(&padded(ACTION_SCHEMA_BYTES_MAX + 1)), SchemaError::TooLong);
    }

    #[test]
    fn older_drafts_and_schemas_within_schemas_are_known() {
        let draft7 = schema(r#"{"$schema":"http://json-schema.org/draft-07/schema#","items":[{"type":"string"}]}"#);
        assert_eq!(draft7.check(r#"{"a":1}"#), Ok(()));
        let tree = schema(
            r##"{"$ref":"#/$defs/node","$defs":{"node":{"properties":{"child":{"$ref":"#/$defs/node"},"n":{"type":"integer"}}}}}"##,
        );
        assert_eq!(tree.check(r#"{"child":{"child":{"n":1}}}"#), Ok(()));
        assert!(reason(&tree, r#"{"child":{"child":{"n":"x"}}}"#).contains("/child/child/n"));
    }

    #[test]
    fn a_schema_that_leads_to_itself_ends() {
        let circle = schema(r##"{"$ref":"#"}"##);
        assert!(circle.check(r#"{"a":1}"#).is_err());
    }

    #[test]
    fn a_message_as_deep_as_may_be_is_looked_at_or_refused() {
        let tree = schema(r##"{"additionalProperties":{"$ref":"#"},"items":{"$ref":"#"}}"##);
        // The message itself is the first level, and brackets in strings are none.
        for (depth, fits) in [(1, true), (31, true), (32, false), (128, false), (30_000, false)] {
            let message = format!(r#"{{"a":{}{},"b":"\"[[{{"}}"#, "[".repeat(depth), "]".repeat(depth));
            assert_eq!(tree.check(&message).is_ok(), fits, "{depth}");
        }
        let brackets = format!(r#"{{"b":"\"{}"}}"#, "[".repeat(1_000));
        assert_eq!(tree.check(&brackets), Ok(()));
        assert_eq!(
            reason(&tree, r#"{"a":1e999}"#),
            "the message holds a number beyond what a schema is checked against"
        );
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(
            text in r#"\{("(type|required|properties|items|enum|const|pattern|anyOf|not|\$ref|minimum)":(1|"a"|"\#"|\[\]|\["a"\]|\{\}|\{"a":\{\}\}|true),?){0,4}\}"#,
            value in any::<i64>(),
        ) {
            if let Ok(schema) = Schema::parse(&text) {
                for message in [format!(r#"{{"a":{value}}}"#), format!(r#"{{"a":["{value}"]}}"#)] {
                    let told = schema.check(&message);
                    prop_assert!(!told.is_err_and(|misfit| misfit.to_string().contains(&value.to_string())) || value.abs() < 2);
                }
            }
        }
    }
}
