//! The life of connections: how long a credential lasts, how it is renewed, and every way a connection ends.

mod support;

use serde_json::json;
use support::Upstream;
use support::server::{DRIVERS, Setup, bearer, token_of};

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    upstream
}

#[test]
fn a_stream_opens_on_both_drivers() {
    for driver in DRIVERS {
        let upstream = upstream();
        let server = Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), "").start();
        assert_eq!(server.ready["driver"], driver);
        let token = token_of("u1");
        let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(ws.next()["type"], "welcome");
        assert_eq!(ws.next_of("snapshot")["data"], json!([{ "id": 1 }]));
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(sse.next().expect("an event").kind, "welcome");
        assert_eq!(sse.next_of("snapshot").data["data"], json!([{ "id": 1 }]));
        upstream.set_json("/leads", r#"[{"id":2}]"#);
        assert_eq!(ws.next()["seq"], 2);
        assert_eq!(sse.next().expect("an event").data["seq"], 2);
    }
}
