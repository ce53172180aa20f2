//! Text with places to fill in: `{n}`, `{n%8}`, `{token}`, `{ts}`, `{i}`. Any other brace stands for itself, so JSON needs no escapes.
//!
//! Source: loadtest/README.md. Memory: the parts of each template, once. Errors: none, every text is a template.

/// A parsed template.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Part {
    Text(String),
    /// The connection's number; with a divisor its remainder.
    Number(Option<u64>),
    Token,
    /// The time of sending in the unit of `--ts-unit`.
    Time,
    /// How many messages of this template were sent before.
    Count,
}

/// What the places are filled with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Values<'a> {
    /// `{n}`.
    pub number: u64,
    /// `{token}`.
    pub token: &'a str,
    /// `{ts}`.
    pub time: u64,
    /// `{i}`.
    pub count: u64,
}

impl Template {
    /// Reads `text`.
    pub fn new(text: &str) -> Template {
        let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find('{') {
            plain.push_str(&rest[..at]);
            let inner = &rest[at + 1..];
            let place = inner.find('}').and_then(|end| Some((place(&inner[..end])?, &inner[end + 1..])));
            match place {
                Some((part, after)) => {
                    if !plain.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(part);
                    rest = after;
                }
                None => {
                    plain.push('{');
                    rest = inner;
                }
            }
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Template { parts }
    }

    /// The text with its places filled.
    pub fn fill(&self, values: Values<'_>) -> String {
        let mut filled = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => filled.push_str(text),
                Part::Number(None) => filled.push_str(&values.number.to_string()),
                Part::Number(Some(divisor)) => filled.push_str(&(values.number % divisor).to_string()),
                Part::Token => filled.push_str(values.token),
                Part::Time => filled.push_str(&values.time.to_string()),
                Part::Count => filled.push_str(&values.count.to_string()),
            }
        }
        filled
    }
}

fn place(name: &str) -> Option<Part> {
    match name {
        "n" => Some(Part::Number(None)),
        "token" => Some(Part::Token),
        "ts" => Some(Part::Time),
        "i" => Some(Part::Count),
        _ => {
            let divisor = name.strip_prefix("n%")?.parse().ok().filter(|&divisor: &u64| divisor > 0)?;
            Some(Part::Number(Some(divisor)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let values = Values { number: 13, token: "a.b.c", time: 77, count: 2 };
        assert_eq!(Template::new(text).fill(values), expected);
    }

    #[test]
    fn places_are_filled_and_other_braces_stand_for_themselves() {
        check("u{n}", "u13");
        check("/s{n%8}?t={token}", "/s5?t=a.b.c");
        check(r#"{"type":"subscribe","stream":"s{n%5}","id":1}"#, r#"{"type":"subscribe","stream":"s3","id":1}"#);
        check(r#"{"at":{ts},"i":{i}}"#, r#"{"at":77,"i":2}"#);
        check("{n%0}{", "{n%0}{");
        check("", "");
    }
}
