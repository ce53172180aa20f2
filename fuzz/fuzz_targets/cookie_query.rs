//! Cookies, queries and escapes, as bytes that need not make a whole request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::http::{Query, cookie, negotiate, parse_head, percent_decode};

fuzz_target!(|data: &[u8]| {
    let _ = negotiate([data]);
    if let Ok(text) = std::str::from_utf8(data) {
        if let Some(decoded) = percent_decode(text) {
            assert!(decoded.len() <= text.len());
            assert!(decoded == text || text.contains('%'), "only escapes are changed");
        }
        let pairs: Vec<_> = Query::new(text).collect();
        assert!(pairs.len() <= 65);
        let errors = pairs.iter().filter(|pair| pair.is_err()).count();
        assert!(
            errors == 0 || (errors == 1 && pairs.last().is_some_and(|last| last.is_err())),
            "nothing follows an error"
        );
    }
    let request = [b"GET / HTTP/1.1\r\nHost: a\r\nCookie: ".as_slice(), data, b"\r\nCookie: last=1\r\n\r\n"].concat();
    if let Ok(Some((head, len))) = parse_head(&request, 1 << 20)
        && len == request.len()
    {
        let written = data.split(|b| *b == b';').filter(|pair| pair.trim_ascii().starts_with(b"last=")).count();
        if written == 0 && !data.contains(&b'\n') {
            match cookie(&head, "last") {
                Ok(value) => assert_eq!(value, Some("1")),
                Err(_) => assert!(data.windows(4).any(|window| window == b"last"), "it stands twice"),
            }
        }
        let _ = cookie(&head, "a");
    }
});
