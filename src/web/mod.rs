//! What the server hands to browsers: the playground, one self-contained document, and the policy it is served under; the
//! client library, an ES module.
//!
//! Source: Content Security Policy Level 3, sections 6.7 (hashes) and 4.2. The library's own source is `client/client.js`;
//! `npm run build` in that folder makes `client/client.min.js` of it, which is what is served.
//! Memory: both stand in the binary once; the policy and the library's tag are a few hundred bytes, made once.
//! Errors: none. Not here: serving them (`shard`), whether the playground is served (`server.playground`).

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::digest::{SHA256, digest};

/// The playground, UTF-8 HTML. It loads nothing else and talks to its own origin alone.
pub const PLAYGROUND: &str = include_str!("playground.html");

/// `Content-Type` of [`PLAYGROUND`].
pub const PLAYGROUND_CONTENT_TYPE: &str = "text/html; charset=utf-8";

/// The client library, UTF-8 JavaScript: an ES module that exports `connect`.
pub const CLIENT: &str = include_str!("client/client.min.js");

/// `Content-Type` of [`CLIENT`].
pub const CLIENT_CONTENT_TYPE: &str = "text/javascript; charset=utf-8";

/// The strong `ETag` of [`CLIENT`]: half of its SHA-256, in quotes.
pub fn client_etag() -> String {
    let hash = digest(&SHA256, CLIENT.as_bytes());
    let half = hash.as_ref().get(..16).unwrap_or_default();
    format!("\"{}\"", URL_SAFE_NO_PAD.encode(half))
}

/// The value of `Content-Security-Policy` for [`PLAYGROUND`]: its one style sheet and its one script by their hashes,
/// connections to its own origin, the icon as a `data:` URL, nothing else, and no framing.
pub fn playground_security_policy() -> String {
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        source_hash("script"),
        source_hash("style"),
    )
}

/// `'sha256-…'` of the text between the document's only `<element>` and its end tag, as a browser hashes it.
fn source_hash(element: &str) -> String {
    let text = inline(element).unwrap_or_default();
    format!("'sha256-{}'", STANDARD.encode(digest(&SHA256, text.as_bytes())))
}

fn inline(element: &str) -> Option<&'static str> {
    let (_, after) = PLAYGROUND.split_once(&format!("<{element}>"))?;
    Some(after.split_once(&format!("</{element}>"))?.0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_document_holds_one_style_and_one_script_and_they_are_what_is_hashed() {
        for element in ["style", "script"] {
            assert_eq!(PLAYGROUND.matches(&format!("<{element}")).count(), 1, "one <{element}>, without attributes");
            assert!(inline(element).is_some_and(|text| text.len() > 1_000));
        }
        // The hash of nothing would mean that nothing was found.
        assert!(!playground_security_policy().contains("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="));
        assert_eq!(playground_security_policy().matches("'sha256-").count(), 2);
    }

    #[test]
    fn the_document_needs_nothing_from_outside_and_nothing_the_policy_forbids() {
        // The only address in it names the XML namespace of SVG.
        let elsewhere = PLAYGROUND.replace("http://www.w3.org/2000/svg", "");
        for forbidden in
            ["http://", "https://www", "//cdn", "<link rel=\"stylesheet\"", "eval(", "new Function", "innerHTML"]
        {
            assert!(!elsewhere.contains(forbidden), "{forbidden}");
        }
        let markup = PLAYGROUND.split("<script>").next().unwrap_or_default();
        for inline_code in [" style=\"", " onclick=", " onload=", "javascript:"] {
            assert!(!markup.contains(inline_code), "{inline_code}");
        }
    }

    /// What the library's source is, for `client.min.js` says of which source it was made.
    const CLIENT_SOURCE: &str = include_str!("client/client.js");
    /// What a browser may have to load, compressed.
    const CLIENT_GZIPPED_BYTES_MAX: usize = 13 << 9;

    #[test]
    fn the_client_library_that_is_served_was_made_of_the_source_beside_it() {
        let hash: String =
            digest(&SHA256, CLIENT_SOURCE.as_bytes()).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let first = CLIENT.lines().next().unwrap_or_default();
        assert!(first.contains(&hash), "`npm ci && npm run build` in src/web/client: {hash} is not in {first:?}");
    }

    #[test]
    fn the_client_library_is_under_six_and_a_half_kibibytes_compressed() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        gzip.write_all(CLIENT.as_bytes()).expect("a Vec takes every write");
        let bytes = gzip.finish().expect("a Vec takes every write").len();
        assert!(bytes < CLIENT_GZIPPED_BYTES_MAX, "{bytes} bytes");
        // Less than a third would mean that it is not there.
        assert!(bytes > CLIENT_GZIPPED_BYTES_MAX / 3, "{bytes} bytes");
    }

    #[test]
    fn the_client_library_evaluates_no_text_and_keeps_nothing_on_disk() {
        for source in [CLIENT, CLIENT_SOURCE] {
            for forbidden in ["eval(", "new Function", "innerHTML", "localStorage", "document.cookie", "token="] {
                assert!(!source.contains(forbidden), "{forbidden}");
            }
        }
    }

    #[test]
    fn the_policy_fits_a_header() {
        let policy = playground_security_policy();
        assert!(policy.len() < 512 && policy.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{policy}");
    }
}
