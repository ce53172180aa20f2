//! Placeholders in an upstream's URL and body, and the names of streams that have parameters.
//!
//! Source: protocol version 1, sections 1 «Templates» and 6 «Actions»; RFC 3986 sections 2.1, 2.3 and 5.2.4; the WHATWG URL standard,
//! through `url`, for what a client would connect to.
//! Memory: the template's text once, in pieces; a fill allocates its result.
//! Errors: [`TemplateError`] is the operator's fault, [`FillError`] the token's issuer's or the caller's,
//! [`StreamNameError`] the caller's. None of them holds a value, a query or a body.
//! Not here: patterns of `params` (`stream::Options`), which claims a token has (`auth`), who may watch.
//!
//! Why a value cannot climb out of its place: it is percent-encoded down to RFC 3986's unreserved characters, so it
//! holds no delimiter; the template was brought to the form the URL parser prints, and a filled-in URL must come out of
//! that parser byte for byte as it went in, so nothing was taken for a dot segment or normalised away. Two different
//! fillings never give one URL: two placeholders in one segment or value must have a character between them that no
//! encoded value holds.

use std::borrow::Cow;
use std::fmt;
use std::fmt::Write as _;

use url::Url;

use crate::ids::StreamId;
use crate::limits::{
    ACTION_BODY_BYTES_MAX, BODY_TEMPLATE_BYTES_MAX, CLAIM_NAME_BYTES_MAX, PARAMS_MAX, PLACEHOLDERS_MAX,
    STREAM_NAME_BYTES_MAX, TEMPLATE_VALUE_BYTES_MAX, URL_TEMPLATE_BYTES_MAX,
};

/// What a placeholder is filled from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Origin {
    /// `{claims.NAME}`: the caller's credential.
    Claims,
    /// `{query.NAME}`: the caller's request.
    Query,
    /// `{message.NAME}`: the caller's message; NAME may lead into it, `{message.property.id}`.
    Message,
}

impl Origin {
    /// What a placeholder from there begins with.
    const fn prefix(self) -> &'static str {
        match self {
            Origin::Claims => "{claims.",
            Origin::Query => "{query.",
            Origin::Message => "{message.",
        }
    }
}

/// Which placeholders a template may have.
#[derive(Clone, Copy)]
enum Scope<'p> {
    /// A stream's: claims, and the parameters that it lists.
    Stream(&'p [&'p str]),
    /// An action's: claims, and whatever the message has.
    Action,
}

/// `{claims.NAME}`, `{query.NAME}` or `{message.NAME}`.
#[derive(Clone, Eq, PartialEq)]
struct Placeholder {
    origin: Origin,
    name: String,
}

impl Placeholder {
    fn missing(&self) -> FillError {
        match self.origin {
            Origin::Claims => FillError::ClaimMissing(self.name.clone()),
            Origin::Query => FillError::QueryMissing(self.name.clone()),
            Origin::Message => FillError::MessageMissing(self.name.clone()),
        }
    }

    fn invalid(&self) -> FillError {
        match self.origin {
            Origin::Claims => FillError::ClaimInvalid(self.name.clone()),
            Origin::Query => FillError::QueryInvalid(self.name.clone()),
            Origin::Message => FillError::MessageInvalid(self.name.clone()),
        }
    }
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}}}", self.origin.prefix(), self.name)
    }
}

/// Why a template is none. The operator's fault; no variant holds the template's text, which may hold secrets.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// The text is over its bound.
    #[error("is over {limit} bytes")]
    TooLong {
        /// Bytes that are allowed.
        limit: usize,
    },
    /// More placeholders than a template may have.
    #[error("has over {limit} placeholders")]
    TooManyPlaceholders {
        /// How many are allowed.
        limit: usize,
    },
    /// A brace that is no part of a placeholder.
    #[error(
        "`{{` and `}}` may only stand in {{claims.NAME}}, {{query.NAME}} (of a stream) and {{message.NAME}} (of an action): write %7B and %7D for the characters themselves"
    )]
    StrayBrace,
    /// A placeholder without a usable name.
    #[error(
        "a placeholder's NAME must have 1 to {CLAIM_NAME_BYTES_MAX} bytes and no brace, white space or control character; that of a message, names between dots"
    )]
    BadName,
    /// `{query.NAME}` whose name is not in `params`.
    #[error("{{query.{0}}} needs \"{0}\" in `params`")]
    NotAParam(String),
    /// A placeholder outside a path segment or query value.
    #[error(
        "{0} may only stand in a path segment or a query value, not in the scheme, host, port, user, query name or fragment"
    )]
    Misplaced(String),
    /// Two placeholders that two different pairs of values would fill alike.
    #[error(
        "between {0} and {1} there must be a character such as `,` or `:`, or different values would give the same URL"
    )]
    Ambiguous(String, String),
    /// Not an absolute `http` or `https` URL.
    #[error("must begin with http:// or https:// and a host")]
    NotHttp,
    /// White space, a control character or a backslash, which URL parsers drop or reinterpret.
    #[error("holds white space, a control character or a backslash: percent-encode it")]
    BadCharacter,
    /// `%` that begins no percent-encoded byte.
    #[error("holds a `%` without two hexadecimal digits after it: write %25 for the character itself")]
    BadPercent,
    /// `.` or `..` as a segment.
    #[error("holds a `.` or `..` path segment: write the path it leads to")]
    DotSegment,
    /// A fragment, which no request carries.
    #[error("holds a fragment (`#`), which is never sent: leave it out, or write %23 for the character itself")]
    Fragment,
    /// Refused by the URL parser.
    #[error("is not a URL: {0}")]
    Url(url::ParseError),
    /// A body placeholder inside a JSON string.
    #[error("{0} stands inside a JSON string: it must stand alone where a JSON value may, without quotes around it")]
    InsideString(String),
    /// A body with placeholders that is not JSON around them.
    #[error("has placeholders and must be JSON with each of them where a value may stand")]
    NotJson,
}

/// Why a template could not be filled, and the name of the claim or parameter.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FillError {
    /// The token lacks a claim the template names: 403 `CLAIM_MISSING`.
    #[error("the token has no string or integer claim \"{0}\", which is needed here")]
    ClaimMissing(String),
    /// The claim's value may not stand in the template: 403 `CLAIM_INVALID`.
    #[error("the value of the claim \"{0}\" cannot stand in a request")]
    ClaimInvalid(String),
    /// The request lacks a parameter the template names: 400 `BAD_REQUEST`.
    #[error("the parameter \"{0}\" is needed for this stream")]
    QueryMissing(String),
    /// The parameter's value may not stand in the template: 400 `BAD_REQUEST`.
    #[error("the value of the parameter \"{0}\" is not allowed for this stream")]
    QueryInvalid(String),
    /// The message lacks a member the template names: `BAD_MESSAGE`.
    #[error("the message has no \"{0}\", which this action needs")]
    MessageMissing(String),
    /// The member's value may not stand in the template: `BAD_MESSAGE`.
    #[error("the value of \"{0}\" in the message cannot stand in this action's request")]
    MessageInvalid(String),
    /// The request's body would be over [`ACTION_BODY_BYTES_MAX`]: `BAD_MESSAGE`.
    #[error("the body of this action's request would be over {ACTION_BODY_BYTES_MAX} bytes")]
    BodyTooLarge,
}

/// A URL with `{claims.NAME}`, and `{query.NAME}` or `{message.NAME}`, in path segments and query values.
///
/// `Debug` and `Display` show it as `check` may: user, password and literal query values as `***`.
#[derive(Clone, Eq, PartialEq)]
pub struct UrlTemplate {
    /// The URL as the parser prints it, around and between the placeholders: one more than those.
    literals: Vec<String>,
    placeholders: Vec<Placeholder>,
    /// The template's own URL with a letter in each place: what scheme, host, port and segment count must stay.
    shape: Url,
}

impl UrlTemplate {
    /// Reads `text`, an absolute `http` or `https` URL; `{query.NAME}` may name what is in `params`.
    pub fn parse<S: AsRef<str>>(text: &str, params: &[S]) -> Result<UrlTemplate, TemplateError> {
        let params: Vec<&str> = params.iter().map(AsRef::as_ref).collect();
        UrlTemplate::parse_in(text, Scope::Stream(&params))
    }

    /// The same for an action's: beside claims it may name members of the message.
    pub fn parse_for_action(text: &str) -> Result<UrlTemplate, TemplateError> {
        UrlTemplate::parse_in(text, Scope::Action)
    }

    fn parse_in(text: &str, scope: Scope<'_>) -> Result<UrlTemplate, TemplateError> {
        if text.len() > URL_TEMPLATE_BYTES_MAX {
            return Err(TemplateError::TooLong { limit: URL_TEMPLATE_BYTES_MAX });
        }
        let (written, placeholders) = split_url(text, scope)?;
        check_literals(&written)?;
        check_places(&written, &placeholders)?;

        // The URL parser normalises the literals with a stand-in for each placeholder: a run of `x` longer than any the
        // text has, between `q`s, so that it is found again.
        let stand_in = format!("q{}q", "x".repeat(longest_run_of_x(text) + 1));
        let marked = Url::parse(&written.join(&stand_in)).map_err(TemplateError::Url)?;
        let literals: Vec<String> = marked.as_str().split(stand_in.as_str()).map(str::to_owned).collect();
        if literals.len() != written.len() || !matches!(marked.scheme(), "http" | "https") || marked.host().is_none() {
            return Err(TemplateError::NotHttp);
        }
        check_ambiguity(&literals, &placeholders)?;
        let shape = Url::parse(&literals.join("x")).map_err(TemplateError::Url)?;
        Ok(UrlTemplate { literals, placeholders, shape })
    }

    /// The URL with each placeholder replaced by its value, percent-encoded.
    ///
    /// A value has 1 to [`TEMPLATE_VALUE_BYTES_MAX`] bytes, is neither `.` nor `..` and has no control character.
    pub fn fill<'v>(
        &self,
        claims: &dyn Fn(&str) -> Option<&'v str>,
        query: &dyn Fn(&str) -> Option<&'v str>,
    ) -> Result<Url, FillError> {
        self.fill_by(&|placeholder| match placeholder.origin {
            Origin::Claims => claims(&placeholder.name).map(Cow::Borrowed),
            Origin::Query => query(&placeholder.name).map(Cow::Borrowed),
            Origin::Message => None,
        })
    }

    /// The same for an action's: `message` gives the JSON of the member that a dotted name leads to. A string stands there
    /// as its content, a number or a Boolean as it is spelled; nothing else may.
    pub fn fill_for_action<'v>(
        &self,
        claims: &dyn Fn(&str) -> Option<&'v str>,
        message: &dyn Fn(&str) -> Option<&'v str>,
    ) -> Result<Url, FillError> {
        self.fill_by(&|placeholder| match placeholder.origin {
            Origin::Claims => claims(&placeholder.name).map(Cow::Borrowed),
            Origin::Query => None,
            // The empty text may not stand in a URL: it is refused as invalid, not as missing.
            Origin::Message => message(&placeholder.name).map(|json| in_url(json).unwrap_or_default()),
        })
    }

    fn fill_by<'v>(&self, value: &dyn Fn(&Placeholder) -> Option<Cow<'v, str>>) -> Result<Url, FillError> {
        let mut filled = String::with_capacity(self.literals.iter().map(|l| l.len() + 24).sum());
        let mut places = Vec::with_capacity(self.placeholders.len());
        for (i, literal) in self.literals.iter().enumerate() {
            filled.push_str(literal);
            let Some(placeholder) = self.placeholders.get(i) else { break };
            let value = value(placeholder).ok_or_else(|| placeholder.missing())?;
            if !may_stand_in_url(&value) {
                return Err(placeholder.invalid());
            }
            places.push((filled.len(), placeholder));
            percent_encode(&mut filled, &value);
        }
        if let Some((_, placeholder)) = places.iter().find(|(at, _)| is_dot_segment(segment_around(&filled, *at))) {
            return Err(placeholder.invalid());
        }
        let Some((_, first)) = places.first() else { return Ok(self.shape.clone()) };
        match Url::parse(&filled) {
            Ok(url) if url.as_str() == filled && self.has_shape_of(&url) => Ok(url),
            // No value is known that gets here; a URL that the parser reads differently is never asked for.
            _ => Err(first.invalid()),
        }
    }

    /// Names of the claims it needs, in order of appearance, each once.
    pub fn claims_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Claims)
    }

    /// Names of the parameters it needs, in order of appearance, each once.
    pub fn query_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Query)
    }

    /// Dotted names of the message's members it needs, in order of appearance, each once.
    pub fn message_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Message)
    }

    fn has_shape_of(&self, url: &Url) -> bool {
        let segments = |url: &Url| url.path_segments().map(Iterator::count);
        url.scheme() == self.shape.scheme()
            && url.host() == self.shape.host()
            && url.port() == self.shape.port()
            && url.username() == self.shape.username()
            && url.password() == self.shape.password()
            && url.fragment().is_none()
            && url.query().is_some() == self.shape.query().is_some()
            && segments(url) == segments(&self.shape)
    }
}

impl fmt::Display for UrlTemplate {
    /// The template with user, password and literal query values as `***`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut in_query = false;
        for (i, literal) in self.literals.iter().enumerate() {
            let mut literal = literal.as_str();
            if i == 0 {
                // The parser prints `scheme://[user[:password]@]host…`; a literal `@` may also stand in the path.
                let (scheme, rest) = literal.split_once("://").unwrap_or(("", literal));
                let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
                match authority.rsplit_once('@') {
                    Some((_, host)) => write!(f, "{scheme}://***@{host}")?,
                    None => write!(f, "{scheme}://{authority}")?,
                }
                literal = path;
            }
            if in_query {
                // What is left of a value that a placeholder has a part in.
                let (tail, rest) = literal.split_at(literal.find('&').unwrap_or(literal.len()));
                if !tail.is_empty() {
                    f.write_str("***")?;
                }
                write_masked_query(f, rest)?;
            } else if let Some((path, query)) = literal.split_once('?') {
                write!(f, "{path}?")?;
                write_masked_query(f, query)?;
                in_query = true;
            } else {
                f.write_str(literal)?;
            }
            if let Some(placeholder) = self.placeholders.get(i) {
                write!(f, "{placeholder}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for UrlTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UrlTemplate({self})")
    }
}

/// What a body's placeholder is filled with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClaimValue<'a> {
    /// Becomes a JSON string.
    Text(&'a str),
    /// The text of an integer, which becomes that JSON number.
    Integer(&'a str),
}

/// What stands in a body's place.
enum BodyValue<'a> {
    /// A claim or a parameter.
    Claim(ClaimValue<'a>),
    /// JSON as somebody sent it, found to be that.
    Json(&'a str),
}

/// A request body: any text, or JSON in which `{claims.NAME}`, and `{query.NAME}` or `{message.NAME}`, stand where values
/// may.
///
/// `Debug` shows none of it.
#[derive(Clone, Eq, PartialEq)]
pub struct BodyTemplate {
    /// The text around and between the placeholders: one more than those.
    literals: Vec<String>,
    placeholders: Vec<Placeholder>,
}

impl BodyTemplate {
    /// Reads `text`; `{query.NAME}` may name what is in `params`. Text without placeholders is taken as it is.
    pub fn parse<S: AsRef<str>>(text: &str, params: &[S]) -> Result<BodyTemplate, TemplateError> {
        let params: Vec<&str> = params.iter().map(AsRef::as_ref).collect();
        BodyTemplate::parse_in(text, Scope::Stream(&params))
    }

    /// The same for an action's: beside claims it may name members of the message.
    pub fn parse_for_action(text: &str) -> Result<BodyTemplate, TemplateError> {
        BodyTemplate::parse_in(text, Scope::Action)
    }

    fn parse_in(text: &str, scope: Scope<'_>) -> Result<BodyTemplate, TemplateError> {
        if text.len() > BODY_TEMPLATE_BYTES_MAX {
            return Err(TemplateError::TooLong { limit: BODY_TEMPLATE_BYTES_MAX });
        }
        let (literals, placeholders) = split_body(text, scope)?;
        if !placeholders.is_empty() {
            let mut in_string = false;
            for (literal, placeholder) in literals.iter().zip(&placeholders) {
                in_string = ends_in_string(literal, in_string);
                if in_string {
                    return Err(TemplateError::InsideString(placeholder.to_string()));
                }
            }
            // With `null` in each place the body is JSON exactly when every value makes it JSON.
            serde_json::from_str::<serde::de::IgnoredAny>(&literals.join("null"))
                .map_err(|_| TemplateError::NotJson)?;
        }
        Ok(BodyTemplate { literals, placeholders })
    }

    /// The body with each placeholder replaced by its value's JSON. A value has at most [`TEMPLATE_VALUE_BYTES_MAX`]
    /// bytes before it is escaped; an integer's text must be a JSON integer.
    pub fn fill<'v>(
        &self,
        claims: &dyn Fn(&str) -> Option<ClaimValue<'v>>,
        query: &dyn Fn(&str) -> Option<&'v str>,
    ) -> Result<Vec<u8>, FillError> {
        self.fill_by(&|placeholder| match placeholder.origin {
            Origin::Claims => claims(&placeholder.name).map(BodyValue::Claim),
            Origin::Query => query(&placeholder.name).map(|text| BodyValue::Claim(ClaimValue::Text(text))),
            Origin::Message => None,
        })
    }

    /// The same for an action's: `message` gives the JSON of the member that a dotted name leads to, which stands in the
    /// body as it was sent. The whole has at most [`ACTION_BODY_BYTES_MAX`] bytes.
    pub fn fill_for_action<'v>(
        &self,
        claims: &dyn Fn(&str) -> Option<ClaimValue<'v>>,
        message: &dyn Fn(&str) -> Option<&'v str>,
    ) -> Result<Vec<u8>, FillError> {
        self.fill_by(&|placeholder| match placeholder.origin {
            Origin::Claims => claims(&placeholder.name).map(BodyValue::Claim),
            Origin::Query => None,
            Origin::Message => message(&placeholder.name).map(BodyValue::Json),
        })
    }

    fn fill_by<'v>(&self, value: &dyn Fn(&Placeholder) -> Option<BodyValue<'v>>) -> Result<Vec<u8>, FillError> {
        let mut filled = String::with_capacity(self.literals.iter().map(|l| l.len() + 24).sum());
        for (i, literal) in self.literals.iter().enumerate() {
            filled.push_str(literal);
            let Some(placeholder) = self.placeholders.get(i) else { break };
            match value(placeholder).ok_or_else(|| placeholder.missing())? {
                BodyValue::Json(json) if filled.len() + json.len() > ACTION_BODY_BYTES_MAX => {
                    return Err(FillError::BodyTooLarge);
                }
                BodyValue::Json(json) => filled.push_str(json),
                BodyValue::Claim(ClaimValue::Text(text)) if text.len() <= TEMPLATE_VALUE_BYTES_MAX => {
                    write_json_string(&mut filled, text);
                }
                BodyValue::Claim(ClaimValue::Integer(text)) if is_json_integer(text) => filled.push_str(text),
                BodyValue::Claim(_) => return Err(placeholder.invalid()),
            }
        }
        Ok(filled.into_bytes())
    }

    /// Names of the claims it needs, in order of appearance, each once.
    pub fn claims_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Claims)
    }

    /// Names of the parameters it needs, in order of appearance, each once.
    pub fn query_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Query)
    }

    /// Dotted names of the message's members it needs, in order of appearance, each once.
    pub fn message_used(&self) -> Vec<&str> {
        names_used(&self.placeholders, Origin::Message)
    }
}

impl fmt::Debug for BodyTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BodyTemplate(***)")
    }
}

/// Why a stream name is none.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum StreamNameError {
    /// Over [`STREAM_NAME_BYTES_MAX`] bytes.
    #[error("stream name over {STREAM_NAME_BYTES_MAX} bytes")]
    TooLong,
    /// What stands before `?` is no stream id.
    #[error("not a stream id: 1 to 128 characters of A-Z a-z 0-9 . _ : ~ -")]
    BadId,
    /// What stands after `?` is not `name=value` pairs, percent-encoded UTF-8.
    #[error("parameters are not name=value pairs joined by &, percent-encoded")]
    BadPairs,
    /// A parameter appears twice.
    #[error("a parameter appears twice")]
    Repeated,
    /// More parameters than a stream may have.
    #[error("over {PARAMS_MAX} parameters")]
    TooMany,
}

/// Name of a stream in frames: its id, and its parameters where it has some, `leads?region=eu`, sorted by name.
pub fn stream_name<N: AsRef<str>, V: AsRef<str>>(id: &StreamId, params: &[(N, V)]) -> String {
    let mut sorted: Vec<(&str, &str)> = params.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
    sorted.sort_unstable();
    let mut text = id.as_str().to_owned();
    for (i, (name, value)) in sorted.into_iter().enumerate() {
        text.push(if i == 0 { '?' } else { '&' });
        percent_encode(&mut text, name);
        text.push('=');
        percent_encode(&mut text, value);
    }
    text
}

/// Reads what [`stream_name`] prints, the pairs in any order: the id and the decoded pairs, sorted by name.
pub fn parse_stream_name(text: &str) -> Result<(StreamId, Vec<(String, String)>), StreamNameError> {
    if text.len() > STREAM_NAME_BYTES_MAX {
        return Err(StreamNameError::TooLong);
    }
    let (id, pairs) = text.split_once('?').map_or((text, None), |(id, pairs)| (id, Some(pairs)));
    let id = StreamId::new(id).ok_or(StreamNameError::BadId)?;
    let mut params: Vec<(String, String)> = Vec::new();
    for pair in pairs.into_iter().flat_map(|pairs| pairs.split('&')) {
        let (name, value) = pair.split_once('=').ok_or(StreamNameError::BadPairs)?;
        let name = percent_decode(name).filter(|name| !name.is_empty()).ok_or(StreamNameError::BadPairs)?;
        let value = percent_decode(value).ok_or(StreamNameError::BadPairs)?;
        if params.len() == PARAMS_MAX {
            return Err(StreamNameError::TooMany);
        }
        params.push((name, value));
    }
    params.sort_unstable();
    if params.windows(2).any(|pair| matches!(pair, [(a, _), (b, _)] if a == b)) {
        return Err(StreamNameError::Repeated);
    }
    Ok((id, params))
}

/// The texts around and between placeholders, and those.
type Split = (Vec<String>, Vec<Placeholder>);

/// Cuts a URL at its placeholders; any other brace is an error.
fn split_url(text: &str, scope: Scope<'_>) -> Result<Split, TemplateError> {
    let (mut literals, mut placeholders) = (Vec::new(), Vec::new());
    let mut rest = text;
    while let Some(brace) = rest.find(['{', '}']) {
        let (literal, from_brace) = rest.split_at(brace);
        let (placeholder, after) = read_placeholder(from_brace, scope).ok_or(TemplateError::StrayBrace)??;
        if placeholders.len() == PLACEHOLDERS_MAX {
            return Err(TemplateError::TooManyPlaceholders { limit: PLACEHOLDERS_MAX });
        }
        literals.push(literal.to_owned());
        placeholders.push(placeholder);
        rest = after;
    }
    literals.push(rest.to_owned());
    Ok((literals, placeholders))
}

/// Cuts a body at its placeholders; other braces are text.
fn split_body(text: &str, scope: Scope<'_>) -> Result<Split, TemplateError> {
    let (mut literals, mut placeholders) = (Vec::new(), Vec::new());
    let (mut literal, mut rest) = (String::new(), text);
    while let Some(brace) = rest.find('{') {
        let (before, from_brace) = rest.split_at(brace);
        literal.push_str(before);
        match read_placeholder(from_brace, scope) {
            None => {
                literal.push('{');
                rest = from_brace.strip_prefix('{').unwrap_or_default();
            }
            Some(_) if placeholders.len() == PLACEHOLDERS_MAX => {
                return Err(TemplateError::TooManyPlaceholders { limit: PLACEHOLDERS_MAX });
            }
            Some(read) => {
                let (placeholder, after) = read?;
                literals.push(std::mem::take(&mut literal));
                placeholders.push(placeholder);
                rest = after;
            }
        }
    }
    literal.push_str(rest);
    literals.push(literal);
    Ok((literals, placeholders))
}

/// The placeholder that `text` begins with and what follows it; `None` where it begins with none.
fn read_placeholder<'t>(text: &'t str, scope: Scope<'_>) -> Option<Result<(Placeholder, &'t str), TemplateError>> {
    let of_caller = match scope {
        Scope::Stream(_) => Origin::Query,
        Scope::Action => Origin::Message,
    };
    let (origin, rest) = match text.strip_prefix(Origin::Claims.prefix()) {
        Some(rest) => (Origin::Claims, rest),
        None => (of_caller, text.strip_prefix(of_caller.prefix())?),
    };
    let Some((name, after)) = rest.split_once('}') else { return Some(Err(TemplateError::BadName)) };
    let usable = |c: char| c != '{' && !c.is_whitespace() && !c.is_control();
    if name.is_empty() || name.len() > CLAIM_NAME_BYTES_MAX || !name.chars().all(usable) {
        return Some(Err(TemplateError::BadName));
    }
    match (origin, scope) {
        (Origin::Message, _) if name.split('.').any(str::is_empty) => return Some(Err(TemplateError::BadName)),
        (Origin::Query, Scope::Stream(params)) if !params.contains(&name) => {
            return Some(Err(TemplateError::NotAParam(name.to_owned())));
        }
        _ => {}
    }
    Some(Ok((Placeholder { origin, name: name.to_owned() }, after)))
}

/// Refuses what a URL parser would drop, reinterpret or complete, so that what is written is what is meant.
fn check_literals(literals: &[String]) -> Result<(), TemplateError> {
    for literal in literals {
        if literal.chars().any(|c| c.is_whitespace() || c.is_control() || c == '\\') {
            return Err(TemplateError::BadCharacter);
        }
        // RFC 3986 section 2.1. A `%` at the end of a literal would swallow the head of a value.
        let escapes = literal.split('%').skip(1);
        if escapes.into_iter().any(|after| after.bytes().take(2).filter(u8::is_ascii_hexdigit).count() < 2) {
            return Err(TemplateError::BadPercent);
        }
    }
    Ok(())
}

/// Walks the URL as written and refuses placeholders that stand elsewhere than in a path segment or query value.
fn check_places(literals: &[String], placeholders: &[Placeholder]) -> Result<(), TemplateError> {
    #[derive(PartialEq)]
    enum At {
        Authority,
        Path,
        QueryName,
        QueryValue,
    }
    let first = literals.first().map_or("", String::as_str);
    let scheme = first.find("://").ok_or(TemplateError::NotHttp)?;
    let (scheme, after) = first.split_at(scheme);
    let authority = after.strip_prefix("://").unwrap_or_default();
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(TemplateError::NotHttp);
    }
    // The parser would skip further slashes and take what follows for the host.
    if authority.starts_with(['/', '?', '#']) || (authority.is_empty() && placeholders.is_empty()) {
        return Err(TemplateError::NotHttp);
    }
    let mut at = At::Authority;
    let mut segment = String::new();
    let mut fixed = true;
    for (i, literal) in literals.iter().enumerate() {
        for c in if i == 0 { authority } else { literal }.chars() {
            match (&at, c) {
                (_, '#') => return Err(TemplateError::Fragment),
                (At::Authority, '/') => at = At::Path,
                (At::Authority, '?') => at = At::QueryName,
                (At::Path, '/' | '?') => {
                    if fixed && is_dot_segment(&segment) {
                        return Err(TemplateError::DotSegment);
                    }
                    (segment, fixed) = (String::new(), true);
                    at = if c == '?' { At::QueryName } else { At::Path };
                }
                (At::Path, c) => segment.push(c),
                (At::QueryName, '=') => at = At::QueryValue,
                (At::QueryValue, '&') => at = At::QueryName,
                _ => {}
            }
        }
        if let Some(placeholder) = placeholders.get(i) {
            if !matches!(at, At::Path | At::QueryValue) {
                return Err(TemplateError::Misplaced(placeholder.to_string()));
            }
            fixed = false;
        }
    }
    match at == At::Path && fixed && is_dot_segment(&segment) {
        true => Err(TemplateError::DotSegment),
        false => Ok(()),
    }
}

/// Refuses two placeholders with nothing between them that could not as well be part of either value.
fn check_ambiguity(literals: &[String], placeholders: &[Placeholder]) -> Result<(), TemplateError> {
    let between = literals.iter().skip(1);
    for (literal, pair) in between.zip(placeholders.windows(2)) {
        let [first, second] = pair else { continue };
        if literal.bytes().all(|b| is_unreserved(b) || b == b'%') {
            return Err(TemplateError::Ambiguous(first.to_string(), second.to_string()));
        }
    }
    Ok(())
}

fn names_used(placeholders: &[Placeholder], origin: Origin) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for placeholder in placeholders.iter().filter(|p| p.origin == origin) {
        if !names.contains(&placeholder.name.as_str()) {
            names.push(&placeholder.name);
        }
    }
    names
}

/// The text that a member's JSON gives a URL: the content of a string, the spelling of a number or a Boolean.
fn in_url(json: &str) -> Option<Cow<'_, str>> {
    match json.as_bytes().first()? {
        b'"' => serde_json::from_str(json).ok().map(Cow::Owned),
        b'-' | b'0'..=b'9' | b't' | b'f' => Some(Cow::Borrowed(json)),
        _ => None,
    }
}

/// Protocol section 1: empty, `.`, `..` or control characters (C0, DEL, C1) are refused.
fn may_stand_in_url(value: &str) -> bool {
    (1..=TEMPLATE_VALUE_BYTES_MAX).contains(&value.len())
        && !matches!(value, "." | "..")
        && !value.chars().any(char::is_control)
}

/// What the URL standard calls a single-dot or double-dot path segment.
fn is_dot_segment(segment: &str) -> bool {
    let mut rest = segment;
    let mut dots = 0;
    while !rest.is_empty() && dots < 3 {
        let Some(after) =
            rest.strip_prefix('.').or_else(|| rest.strip_prefix("%2e")).or_else(|| rest.strip_prefix("%2E"))
        else {
            return false;
        };
        rest = after;
        dots += 1;
    }
    matches!(dots, 1 | 2) && rest.is_empty()
}

/// The part of `url` between the delimiters around byte `at`.
fn segment_around(url: &str, at: usize) -> &str {
    let (before, after) = url.split_at_checked(at).unwrap_or((url, ""));
    let start = before.rfind(['/', '?']).map_or(0, |slash| slash + 1);
    let end = at + after.find(['/', '?']).unwrap_or(after.len());
    // In a query `/` delimits nothing, but a value that would make up a dot segment there is no loss either.
    url.get(start..end).unwrap_or_default()
}

fn longest_run_of_x(text: &str) -> usize {
    text.split(|c: char| !c.eq_ignore_ascii_case(&'x')).map(str::len).max().unwrap_or(0)
}

/// RFC 3986 section 2.3.
const fn is_unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~')
}

/// Appends `text`, all but the unreserved characters percent-encoded (RFC 3986 sections 2.1 and 2.3).
fn percent_encode(out: &mut String, text: &str) {
    for b in text.bytes() {
        if is_unreserved(b) {
            out.push(char::from(b));
        } else {
            write!(out, "%{b:02X}").expect("writing to a String does not fail");
        }
    }
}

/// Decodes percent-encoding once; `None` for a `%` without two digits and for what is not UTF-8 then. `+` is itself.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(b) = rest.next() {
        if b == b'%' {
            let (high, low) = (char::from(rest.next()?).to_digit(16)?, char::from(rest.next()?).to_digit(16)?);
            bytes.push(u8::try_from(high << 4 | low).ok()?);
        } else {
            bytes.push(b);
        }
    }
    String::from_utf8(bytes).ok()
}

/// `query`, which begins at a `&` or a name, with each value as `***`; a value's placeholder follows a last, empty one.
fn write_masked_query(f: &mut fmt::Formatter<'_>, query: &str) -> fmt::Result {
    for (i, pair) in query.split('&').enumerate() {
        if i > 0 {
            f.write_str("&")?;
        }
        match pair.split_once('=') {
            Some((name, "")) => write!(f, "{name}=")?,
            Some((name, _)) => write!(f, "{name}=***")?,
            None if pair.is_empty() => {}
            // `?abc` is as likely a value as a name.
            None => f.write_str("***")?,
        }
    }
    Ok(())
}

/// Whether JSON text that began inside a string (or not) ends inside one.
fn ends_in_string(text: &str, began_in_string: bool) -> bool {
    let (mut in_string, mut escaped) = (began_in_string, false);
    for b in text.bytes() {
        match b {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ => {}
        }
    }
    in_string
}

/// Appends `text` as a JSON string (RFC 8259 section 7).
fn write_json_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a String does not fail");
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// RFC 8259 section 6, without fraction and exponent.
fn is_json_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    (1..=TEMPLATE_VALUE_BYTES_MAX).contains(&text.len())
        && digits.bytes().all(|b| b.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'))
        && !digits.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_assert_ne, prop_assume, proptest};

    use super::*;

    const NO_PARAMS: [&str; 0] = [];

    fn template(text: &str) -> Result<UrlTemplate, TemplateError> {
        UrlTemplate::parse(text, &["region", "q"])
    }

    /// Fills every claim with `claim` and every parameter with `query`.
    fn fill(text: &str, claim: &str, query: &str) -> Result<String, FillError> {
        template(text).expect(text).fill(&|_| Some(claim), &|_| Some(query)).map(String::from)
    }

    fn body(text: &str) -> Result<BodyTemplate, TemplateError> {
        BodyTemplate::parse(text, &["region"])
    }

    #[test]
    fn values_are_percent_encoded_into_their_places() {
        let text = "https://api/companies/{claims.companyId}/leads?r={query.region}";
        assert_eq!(fill(text, "42", "eu").as_deref(), Ok("https://api/companies/42/leads?r=eu"));
        assert_eq!(
            fill(text, "a/b?c#d@e\\f%2f é", "a&b=c+d").as_deref(),
            Ok("https://api/companies/a%2Fb%3Fc%23d%40e%5Cf%252f%20%C3%A9/leads?r=a%26b%3Dc%2Bd")
        );
        assert_eq!(fill("http://h/v{claims.v}.json?x", "1", "").as_deref(), Ok("http://h/v1.json?x"));
        assert_eq!(fill("HTTP://H:80/%7e/x", "", "").as_deref(), Ok("http://h/%7e/x"), "no placeholder, normalised");
        let namespaced = template("http://h/{claims.https://x.example/company?id}").expect("claim names may be URLs");
        assert_eq!(namespaced.claims_used(), ["https://x.example/company?id"]);
    }

    #[test]
    fn the_claims_and_parameters_a_template_needs_are_told() {
        let it = template("http://h/{claims.a}/{claims.b}/{claims.a}?x={query.q}").expect("a template");
        assert_eq!((it.claims_used(), it.query_used()), (vec!["a", "b"], vec!["q"]));
        let it = body("[{claims.a},{query.region},{claims.a}]").expect("a template");
        assert_eq!((it.claims_used(), it.query_used()), (vec!["a"], vec!["region"]));
    }

    #[test]
    fn values_that_move_in_a_path_are_refused() {
        let claim = |value: &str| fill("https://h/a/{claims.x}/b", value, "");
        for bad in ["", ".", "..", "a\0", "a\n", "\u{7f}", "\u{85}"] {
            assert_eq!(claim(bad), Err(FillError::ClaimInvalid("x".into())), "{bad:?}");
            assert_eq!(fill("http://h/?a={query.q}", "", bad), Err(FillError::QueryInvalid("q".into())), "{bad:?}");
        }
        assert_eq!(claim("...").as_deref(), Ok("https://h/a/.../b"));
        assert_eq!(claim("%2e%2E").as_deref(), Ok("https://h/a/%252e%252E/b"));
        assert!(claim(&"a".repeat(1024)).is_ok());
        assert_eq!(claim(&"a".repeat(1025)), Err(FillError::ClaimInvalid("x".into())));
        for (text, value) in [
            ("https://h/a/.{claims.x}/b", "."),
            ("https://h/a/{claims.x}./b", "."),
            ("https://h/a/%2e{claims.x}", "."),
            ("https://h/{claims.y}/{claims.x}%2E?a", "."),
        ] {
            let url = template(text).expect(text);
            let claims = |name: &str| Some(if name == "x" { value } else { "y" });
            assert_eq!(url.fill(&claims, &|_| None), Err(FillError::ClaimInvalid("x".into())), "{text}");
        }
    }

    /// What the same values make of the same template as a stream's.
    fn url_of_stream(text: &str, claim: &str, query: &str) -> Result<Url, FillError> {
        template(text).expect(text).fill(&|_| Some(claim), &|_| Some(query))
    }

    #[test]
    fn an_actions_templates_have_members_of_the_message_and_no_parameters() {
        let url = |text: &str| UrlTemplate::parse_for_action(text);
        assert_eq!(
            url("http://h/{message.a.b}/{claims.c}?x={message.d}").expect("a template").message_used(),
            ["a.b", "d"]
        );
        for (text, error) in [
            ("http://h/{query.q}", TemplateError::StrayBrace),
            ("http://h/{message.}", TemplateError::BadName),
            ("http://h/{message.a.}", TemplateError::BadName),
            ("http://h/{message..a}", TemplateError::BadName),
            ("http://h/{message.a b}", TemplateError::BadName),
            ("http://{message.h}/", TemplateError::Misplaced("{message.h}".into())),
            ("http://h:{message.p}/", TemplateError::Misplaced("{message.p}".into())),
            ("http://h/?{message.n}=1", TemplateError::Misplaced("{message.n}".into())),
            ("http://h/#{message.n}", TemplateError::Fragment),
            ("http://h/{message.a}{claims.b}", TemplateError::Ambiguous("{message.a}".into(), "{claims.b}".into())),
        ] {
            assert_eq!(url(text).map(drop), Err(error), "{text}");
        }
        assert_eq!(template("http://h/{message.a}").map(drop), Err(TemplateError::StrayBrace), "not of a stream");
        let body = |text: &str| BodyTemplate::parse_for_action(text).map(drop);
        assert_eq!(body(r#"{"a":"{message.a}"}"#), Err(TemplateError::InsideString("{message.a}".into())));
        assert_eq!(body("{message.a}{message.b}"), Err(TemplateError::NotJson));
        assert_eq!(body(r#"{"a":{query.a}}"#), Ok(()), "no placeholder, and so any text");
        assert_eq!(body(r#"{"a":{query.a},"b":{message.b}}"#), Err(TemplateError::NotJson));
    }

    #[test]
    fn an_actions_body_has_its_bound() {
        let it = BodyTemplate::parse_for_action("[{message.a}]").expect("a template");
        let fits = "1".repeat(ACTION_BODY_BYTES_MAX - 1);
        assert!(it.fill_for_action(&|_| None, &|_| Some(&fits)).is_ok());
        let over = "1".repeat(ACTION_BODY_BYTES_MAX);
        assert_eq!(it.fill_for_action(&|_| None, &|_| Some(&over)), Err(FillError::BodyTooLarge));
    }

    #[test]
    fn what_is_missing_is_named() {
        let url = template("https://h/{claims.x}?q={query.q}").expect("a template");
        assert_eq!(url.fill(&|_| None, &|_| Some("a")), Err(FillError::ClaimMissing("x".into())));
        assert_eq!(url.fill(&|_| Some("a"), &|_| None), Err(FillError::QueryMissing("q".into())));
    }

    #[test]
    fn placeholders_stand_in_segments_and_query_values_only() {
        let misplaced = |name: &str| TemplateError::Misplaced(name.into());
        for text in [
            "https://{claims.x}/",
            "https://a{claims.x}.example/",
            "https://h:{claims.x}/",
            "https://u:{claims.x}@h/",
            "https://h{claims.x}",
            "https://h/?{claims.x}",
            "https://h/?{claims.x}=1",
            "https://h?a=1&b{claims.x}",
        ] {
            assert_eq!(template(text).map(drop), Err(misplaced("{claims.x}")), "{text}");
        }
        for (text, error) in [
            ("https://h/#{claims.x}", TemplateError::Fragment),
            ("{claims.x}://h/", TemplateError::NotHttp),
            ("http{claims.x}://h/", TemplateError::NotHttp),
            ("ftp://h/", TemplateError::NotHttp),
            ("h/a", TemplateError::NotHttp),
            ("/a", TemplateError::NotHttp),
            ("", TemplateError::NotHttp),
            ("https://", TemplateError::NotHttp),
            ("https:///h/", TemplateError::NotHttp),
            ("https://?a", TemplateError::NotHttp),
            ("https://h/a b", TemplateError::BadCharacter),
            ("https://h\\a", TemplateError::BadCharacter),
            ("https://h/a\tb", TemplateError::BadCharacter),
            ("https://h/%", TemplateError::BadPercent),
            ("https://h/%{claims.x}", TemplateError::BadPercent),
            ("https://h/%2{claims.x}", TemplateError::BadPercent),
            ("https://h/%zz", TemplateError::BadPercent),
            ("https://h/a/../b", TemplateError::DotSegment),
            ("https://h/a/%2e%2E", TemplateError::DotSegment),
            ("https://h/{claims.x}/.?a", TemplateError::DotSegment),
            ("https://h/{x}", TemplateError::StrayBrace),
            ("https://h/}", TemplateError::StrayBrace),
            ("https://h/{message.id}", TemplateError::StrayBrace),
            ("https://h/{claims.}", TemplateError::BadName),
            ("https://h/{claims.a b}", TemplateError::BadName),
            ("https://h/{claims.a", TemplateError::BadName),
            ("https://h/{query.nope}", TemplateError::NotAParam("nope".into())),
            ("https://h:99999/", TemplateError::Url(url::ParseError::InvalidPort)),
        ] {
            assert_eq!(template(text).map(drop), Err(error), "{text}");
        }
    }

    #[test]
    fn bounds_hold_at_their_value_and_not_past_it() {
        let long = |n: usize| format!("https://h/{}", "a".repeat(n - "https://h/".len()));
        assert!(template(&long(URL_TEMPLATE_BYTES_MAX)).is_ok());
        assert_eq!(template(&long(URL_TEMPLATE_BYTES_MAX + 1)).map(drop), Err(TemplateError::TooLong { limit: 8192 }));
        let many = |n: usize| format!("https://h{}", "/{claims.a}".repeat(n));
        assert!(template(&many(16)).is_ok());
        assert_eq!(template(&many(17)).map(drop), Err(TemplateError::TooManyPlaceholders { limit: 16 }));
        let named = |n: usize| format!("https://h/{{claims.{}}}", "a".repeat(n));
        assert!(template(&named(128)).is_ok());
        assert_eq!(template(&named(129)).map(drop), Err(TemplateError::BadName));
        assert!(body(&"a".repeat(BODY_TEMPLATE_BYTES_MAX)).is_ok());
        assert_eq!(
            body(&"a".repeat(BODY_TEMPLATE_BYTES_MAX + 1)).map(drop),
            Err(TemplateError::TooLong { limit: 65536 })
        );
        let many = |n: usize| format!("[{}0]", "{claims.a},".repeat(n));
        assert!(body(&many(16)).is_ok());
        assert_eq!(body(&many(17)).map(drop), Err(TemplateError::TooManyPlaceholders { limit: 16 }));
    }

    #[test]
    fn two_pairs_of_values_never_give_one_url() {
        for text in
            ["https://h/{claims.a}{query.q}", "https://h/{claims.a}-{query.q}", "https://h/?a={claims.a}%2C{query.q}"]
        {
            let error = TemplateError::Ambiguous("{claims.a}".into(), "{query.q}".into());
            assert_eq!(template(text).map(drop), Err(error), "{text}");
        }
        assert!(template("https://h/{claims.a},{query.q}").is_ok());
        assert!(template("https://h/?a={claims.a}:{query.q}").is_ok());
    }

    #[test]
    fn a_template_prints_neither_password_nor_query_values() {
        for (text, shown) in [
            ("https://ada:pw@h/x?key=abc&b&c=1", "https://***@h/x?key=***&***&c=***"),
            ("https://ada@h:81/@{claims.a}/x", "https://***@h:81/@{claims.a}/x"),
            ("https://h/{claims.a}?a=b&r={query.q}&k=v", "https://h/{claims.a}?a=***&r={query.q}&k=***"),
            ("https://h/?a=b{query.q}c&d=e/f?g", "https://h/?a=***{query.q}***&d=***"),
            ("https://h/qxxq{claims.a}xq", "https://h/qxxq{claims.a}xq"),
        ] {
            let it = template(text).expect(text);
            assert_eq!(it.to_string(), shown);
            assert_eq!(format!("{it:?}"), format!("UrlTemplate({shown})"));
        }
        assert_eq!(format!("{:?}", body("hunter2")), "Ok(BodyTemplate(***))");
    }

    #[test]
    fn body_placeholders_become_json_values() {
        let it = body(r#"{"company":{claims.companyId},"q":["a\"{b",{query.region}]}"#).expect("a template");
        let text = it.fill(&|_| Some(ClaimValue::Integer("42")), &|_| Some("e\"u\\\n\u{80}é"));
        let text = String::from_utf8(text.expect("filled")).expect("UTF-8");
        assert_eq!(text, r#"{"company":42,"q":["a\"{b","e\"u\\\u000a\u0080é"]}"#);
        assert_eq!(
            body("{claims.a}").expect("alone").fill(&|_| Some(ClaimValue::Text("")), &|_| None),
            Ok(b"\"\"".into())
        );
        assert_eq!(body("not {json").expect("text").fill(&|_| None, &|_| None), Ok(b"not {json".to_vec()));
    }

    #[test]
    fn body_placeholders_stand_where_values_may() {
        assert_eq!(body(r#"{"a":"x{claims.a}"}"#).map(drop), Err(TemplateError::InsideString("{claims.a}".into())));
        for text in ["{claims.a} {claims.b}", "{{claims.a}:1}", "1{claims.a}", "text {claims.a}", "{\"a\":{claims.a}"] {
            assert_eq!(body(text).map(drop), Err(TemplateError::NotJson), "{text}");
        }
        assert_eq!(body("{query.nope}").map(drop), Err(TemplateError::NotAParam("nope".into())));
        let it = body("{claims.a}").expect("a template");
        let long = "a".repeat(1025);
        for bad in ["", "-", "01", "1.5", "1e5", "+1", "null", "1,2"].map(ClaimValue::Integer) {
            assert_eq!(it.fill(&|_| Some(bad), &|_| None), Err(FillError::ClaimInvalid("a".into())), "{bad:?}");
        }
        assert!(it.fill(&|_| long.get(1..).map(ClaimValue::Text), &|_| None).is_ok());
        assert!(it.fill(&|_| Some(ClaimValue::Text(&long)), &|_| None).is_err());
        assert_eq!(it.fill(&|_| Some(ClaimValue::Integer("-10")), &|_| None), Ok(b"-10".to_vec()));
        assert_eq!(it.fill(&|_| None, &|_| None), Err(FillError::ClaimMissing("a".into())));
    }

    #[test]
    fn stream_names_read_back_what_they_print() {
        let leads = StreamId::new("leads").expect("an id");
        assert_eq!(stream_name(&leads, &NO_PARAMS.map(|n| (n, n))), "leads");
        let name = stream_name(&leads, &[("region", "eu"), ("a", "x y&é")]);
        assert_eq!(name, "leads?a=x%20y%26%C3%A9&region=eu");
        let pairs = vec![("a".to_owned(), "x y&é".to_owned()), ("region".to_owned(), "eu".to_owned())];
        assert_eq!(parse_stream_name(&name), Ok((leads.clone(), pairs)));
        assert_eq!(parse_stream_name("leads"), Ok((leads, vec![])));
        for (bad, error) in [
            ("", StreamNameError::BadId),
            ("a/b?x=1", StreamNameError::BadId),
            ("leads?", StreamNameError::BadPairs),
            ("leads?a", StreamNameError::BadPairs),
            ("leads?=1", StreamNameError::BadPairs),
            ("leads?a=1&", StreamNameError::BadPairs),
            ("leads?a=%", StreamNameError::BadPairs),
            ("leads?a=%+1", StreamNameError::BadPairs),
            ("leads?a=%ff", StreamNameError::BadPairs),
            ("leads?a=1&%61=2", StreamNameError::Repeated),
        ] {
            assert_eq!(parse_stream_name(bad), Err(error), "{bad}");
        }
        let many = |n: usize| format!("leads?{}", (0..n).map(|i| format!("p{i}=1")).collect::<Vec<_>>().join("&"));
        assert!(parse_stream_name(&many(16)).is_ok());
        assert_eq!(parse_stream_name(&many(17)), Err(StreamNameError::TooMany));
        let long = |n: usize| format!("leads?a={}", "b".repeat(n - "leads?a=".len()));
        assert!(parse_stream_name(&long(STREAM_NAME_BYTES_MAX)).is_ok());
        assert_eq!(parse_stream_name(&long(STREAM_NAME_BYTES_MAX + 1)), Err(StreamNameError::TooLong));
    }

    /// Values that try to climb, among arbitrary ones.
    fn value() -> impl Strategy<Value = String> {
        let hostile =
            proptest::sample::select(vec!["..", ".", "/", "%2f", "%2e", "\\", "?", "#", "@", ":", "a", "é", ";", "//"]);
        let joined = proptest::collection::vec(hostile, 0..6).prop_map(|parts| parts.concat());
        proptest::strategy::Union::new([joined.boxed(), any::<String>().boxed()])
    }

    const TEXTS: [&str; 6] = [
        "https://u:p@api.example:8443/a/{claims.x}/b?r={query.q}&k=v",
        "https://api.example/.{claims.x}/{query.q}.",
        "https://api.example/%2e{claims.x},{query.q}",
        "http://[::1]/{claims.x}?a={query.q}",
        "http://api.example?a=x{claims.x};{query.q}y",
        "http://api.example//{claims.x}//{query.q}/",
    ];

    proptest! {
        #[test]
        fn no_value_climbs_out_of_its_place(claim in value(), query in value(), which in 0..TEXTS.len()) {
            let url = template(TEXTS[which]).expect("a template");
            let segments = |url: &Url| url.path_segments().map(Iterator::count);
            if let Ok(filled) = url.fill(&|_| Some(&claim), &|_| Some(&query)) {
                let plain = url.fill(&|_| Some("c"), &|_| Some("q")).expect("plain values fill");
                prop_assert_eq!(filled.origin(), plain.origin());
                prop_assert_eq!(filled.authority(), plain.authority());
                prop_assert_eq!(segments(&filled), segments(&plain));
                prop_assert_eq!(filled.fragment(), None);
                prop_assert_eq!(filled.query_pairs().count(), plain.query_pairs().count());
                let reread = Url::parse(filled.as_str());
                prop_assert_eq!(reread.as_ref(), Ok(&filled));
            }
        }

        #[test]
        fn no_member_of_a_message_climbs_out_of_its_place(member in value(), claim in value(), which in 0..TEXTS.len()) {
            let text = TEXTS[which].replace("{query.q}", "{message.a.b}");
            let url = UrlTemplate::parse_for_action(&text).expect("a template");
            let segments = |url: &Url| url.path_segments().map(Iterator::count);
            let json = serde_json::to_string(&member).expect("JSON");
            let fill = |claim: &str, json: &str| url.fill_for_action(&|_| Some(claim), &|_| Some(json));
            if let Ok(filled) = fill(&claim, &json) {
                let plain = fill("c", "1").expect("plain values fill");
                prop_assert_eq!(filled.origin(), plain.origin());
                prop_assert_eq!(filled.authority(), plain.authority());
                prop_assert_eq!(segments(&filled), segments(&plain));
                prop_assert_eq!(filled.fragment(), None);
                prop_assert_eq!(filled.query_pairs().count(), plain.query_pairs().count());
                let reread = Url::parse(filled.as_str());
                prop_assert_eq!(reread.as_ref(), Ok(&filled));
                prop_assert_eq!(fill(&claim, &json), url_of_stream(TEXTS[which], &claim, &member));
            }
        }

        #[test]
        fn a_member_stands_in_a_body_as_it_was_sent(text in any::<String>(), number in any::<f64>()) {
            let number = if number.is_finite() { format!("{number:e}") } else { "1E400".to_owned() };
            let string = serde_json::to_string(&text).expect("JSON");
            let members = format!(r#"{{ "n" : {number}, "s":[{string} ,{{}}]}}"#);
            let it = BodyTemplate::parse_for_action("[{message.it},{claims.c}]").expect("a template");
            let filled = it.fill_for_action(&|_| Some(ClaimValue::Text(&text)), &|_| Some(&members));
            match filled {
                Ok(filled) => {
                    let expected = format!("[{members},");
                    prop_assert!(filled.starts_with(expected.as_bytes()));
                }
                Err(error) => prop_assert!(text.len() > TEMPLATE_VALUE_BYTES_MAX, "{error}"),
            }
        }

        #[test]
        fn different_values_give_different_urls(a in value(), b in value(), c in value(), d in value(), which in 0..TEXTS.len()) {
            prop_assume!((&a, &b) != (&c, &d));
            let url = template(TEXTS[which]).expect("a template");
            if let (Ok(one), Ok(other)) =
                (url.fill(&|_| Some(&a), &|_| Some(&b)), url.fill(&|_| Some(&c), &|_| Some(&d)))
            {
                prop_assert_ne!(one, other);
            }
        }

        #[test]
        fn a_filled_body_is_json_and_holds_the_value(claim in any::<String>(), number in any::<i64>()) {
            let it = BodyTemplate::parse(r#"{"a":{claims.a},"b":[{claims.b}]}"#, &NO_PARAMS).expect("a template");
            let number_text = number.to_string();
            let claims = |name: &str| Some(match name {
                "a" => ClaimValue::Text(&claim),
                _ => ClaimValue::Integer(&number_text),
            });
            let filled = it.fill(&claims, &|_| None).expect("filled");
            let json: serde_json::Value = serde_json::from_slice(&filled).expect("JSON");
            prop_assert_eq!(json, serde_json::json!({"a": claim, "b": [number]}));
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in any::<String>(), tail in value()) {
            let url = format!("https://h/{tail}{{claims.x}}{tail}?{tail}={{query.q}}{text}");
            if let Ok(it) = template(&url) {
                drop(it.fill(&|_| Some(&text), &|_| Some(&tail)));
                prop_assert!(!it.to_string().is_empty());
            }
            drop((template(&text), body(&text), parse_stream_name(&text)));
        }

        #[test]
        fn any_parameters_survive_a_stream_name(pairs in proptest::collection::btree_map("[a-z]{1,8}|\\PC{1,5}", any::<String>(), 0..8)) {
            let id = StreamId::new("orders:1").expect("an id");
            let pairs: Vec<(String, String)> = pairs.into_iter().collect();
            prop_assert_eq!(parse_stream_name(&stream_name(&id, &pairs)), Ok((id, pairs)));
        }
    }
}
