//! For how long an answer may be used.
//!
//! Source: RFC 9111 sections 4.2, 5.1 and 5.2.2. Memory: none. Errors: what cannot be read says nothing.

use std::time::Duration;

use crate::codec::http::parse_content_length;

/// How much longer an answer with these `Cache-Control` and `Age` fields may be used: `max-age` less its age; not at all where
/// it is not to be stored, or not without asking again; `None`: it does not say.
pub fn fresh_for<'a>(cache_control: impl Iterator<Item = &'a [u8]>, age: Option<&[u8]>) -> Option<Duration> {
    let mut max_age = None;
    for directive in cache_control.flat_map(|field| field.split(|&byte| byte == b',')) {
        let directive = directive.trim_ascii();
        let (name, argument) = match directive.iter().position(|&byte| byte == b'=') {
            Some(at) => directive.split_at(at),
            None => (directive, &b""[..]),
        };
        if name.eq_ignore_ascii_case(b"no-store") || name.eq_ignore_ascii_case(b"no-cache") && argument.is_empty() {
            return Some(Duration::ZERO);
        }
        if name.eq_ignore_ascii_case(b"max-age") && max_age.is_none() {
            let digits = argument.strip_prefix(b"=").unwrap_or(argument);
            // RFC 9111 5.2: quoted by some, which is to be understood.
            let digits = digits.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(digits);
            // What is no number is stale (RFC 9111 4.2.1).
            max_age = Some(parse_content_length(digits).unwrap_or(0));
        }
    }
    let age = age.and_then(parse_content_length).unwrap_or(0);
    max_age.map(|max_age| Duration::from_secs(max_age.saturating_sub(age)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_fresh_for_its_max_age_less_its_age() {
        let fresh = |fields: &[&str], age: Option<&str>| {
            let fields = fields.iter().map(|field| field.as_bytes());
            fresh_for(fields, age.map(str::as_bytes)).map(|fresh| fresh.as_secs())
        };
        assert_eq!(fresh(&[], None), None);
        assert_eq!(fresh(&["public"], Some("7")), None);
        assert_eq!(fresh(&["public, max-age=600, must-revalidate"], None), Some(600));
        assert_eq!(fresh(&["public", "Max-Age=\"600\""], Some("100")), Some(500));
        assert_eq!(fresh(&["max-age=600"], Some("601")), Some(0));
        assert_eq!(fresh(&["max-age=600"], Some("soon")), Some(600));
        assert_eq!(fresh(&["max-age=600, max-age=900"], None), Some(600));
        for stale in ["no-store", "no-cache, max-age=600", "max-age=600, NO-STORE", "max-age=-1", "max-age=", "max-age"]
        {
            assert_eq!(fresh(&[stale], None), Some(0), "{stale}");
        }
        assert_eq!(fresh(&["no-cache=\"Set-Cookie\", max-age=60"], None), Some(60), "of a field, not of the answer");
        assert_eq!(fresh(&["max-age=99999999999999999999999"], None), Some(u64::MAX));
    }
}
