//! Request heads and what is read of them: the same outcome whole and in pieces, and nothing a client sends panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::forwarded::{client, proxy_v2};
use restcast::codec::http::{
    BodyDecoder, BodyError, BodyLength, Head, Query, accept_key, bearer, cookie, if_none_match, negotiate, parse_head,
    percent_decode, prefer_wait, websocket_upgrade, write_switching_protocols,
};

fuzz_target!(|data: &[u8]| {
    let bytes_max = if data.first().is_some_and(|b| *b < 0x20) { 64 } else { 16 << 10 };
    let whole = parse_head(data, bytes_max);
    let mut decided = false;
    for len in 0..=data.len().min(2048) {
        match parse_head(&data[..len], bytes_max) {
            Ok(None) => assert!(!decided, "decided, then undecided again after {len} bytes"),
            early => {
                decided = true;
                assert_eq!(early, whole, "after {len} bytes");
            }
        }
    }
    if let Ok(Some((head, len))) = &whole {
        assert!(*len <= data.len() && *len <= bytes_max);
        read_fields(head);
        read_body(head.body, &data[*len..]);
    }
    let proxied = proxy_v2(data);
    for len in 0..data.len().min(64) {
        let early = proxy_v2(&data[..len]);
        assert!(early == Ok(None) || early == proxied);
    }
});

fn read_fields(head: &Head<'_>) {
    if let Ok(Some(upgrade)) = websocket_upgrade(head) {
        let mut out = Vec::new();
        let extra = [("Sec-WebSocket-Extensions", &*upgrade.extensions)];
        write_switching_protocols(&mut out, &accept_key(upgrade.key), upgrade.protocols.first().copied(), &extra);
        let ends = out.windows(4).filter(|window| window == b"\r\n\r\n").count();
        assert_eq!(ends, 1, "what was offered cannot end the answer early");
    }
    let _ = (negotiate(head.all("accept")), prefer_wait(head), if_none_match(head, "\"a-1\""), bearer(head));
    let _ = (cookie(head, "a"), cookie(head, "connect.sid"), percent_decode(head.path), format!("{head:?}"));
    let _ = Query::new(head.query.unwrap_or_default()).count();
    let trusted = ["10.0.0.0/8".parse().expect("a net")];
    let _ = client("10.0.0.1".parse().expect("an address"), &trusted, head);
    let stranger = client("192.0.2.1".parse().expect("an address"), &trusted, head);
    assert_eq!(stranger.addr.to_string(), "192.0.2.1");
}

fn read_body(length: BodyLength, bytes: &[u8]) {
    let in_pieces = |size: usize| -> Result<(Vec<u8>, usize, bool), BodyError> {
        let mut decoder = BodyDecoder::new(length)?;
        let (mut out, mut consumed, mut done) = (Vec::new(), 0, false);
        for piece in bytes.chunks(size) {
            let (read, whole) = decoder.feed(piece, &mut out)?;
            consumed += read;
            done = whole;
            if done {
                break;
            }
            assert_eq!(read, piece.len(), "a body that is not whole takes all");
        }
        Ok((out, consumed, done))
    };
    let whole = in_pieces(bytes.len().max(1));
    for size in [1, 2, 7] {
        assert_eq!(in_pieces(size), whole);
    }
}
