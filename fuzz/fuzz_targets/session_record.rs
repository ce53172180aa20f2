//! Records of sessions and of tickets, as a store gives them. None may panic; what is kept of one stands in it, is bounded,
//! and is what another reader of JSON finds at the same place. What a ticket's record is written as reads back.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use restcast::auth::session::{CookieSecrets, Options, Place, Record};
use restcast::auth::ticket::TicketRecord;
use restcast::limits::{SESSION_LISTED_MAX, SESSION_TEXT_BYTES_MAX};
use restcast::time::WallTime;

static OPTIONS: LazyLock<Options> = LazyLock::new(|| {
    let place = |text: &str| Place::new(text, &text.split('/').skip(1).map(str::to_owned).collect::<Vec<_>>());
    Options {
        secrets: CookieSecrets::new(&[]),
        cookie: "connect.sid".into(),
        prefix: "sess:".into(),
        user: place("/u/0/id"),
        role: place("/role"),
        company: place("/c/1"),
        permissions: place("/p"),
        reread: Duration::from_secs(30),
        grace: Duration::from_secs(300),
        touch: false,
    }
});

fuzz_target!(|data: &[u8]| {
    let claims = ["companyId".to_owned(), "region".to_owned(), "u".to_owned()];
    if let Ok(record) = Record::parse(data, &OPTIONS, &claims) {
        assert!((1..=SESSION_TEXT_BYTES_MAX).contains(&record.user.len()));
        let rights = &record.rights;
        assert!(rights.roles.len() <= SESSION_LISTED_MAX && rights.permissions.len() <= SESSION_LISTED_MAX);
        assert!(rights.claims.len() <= claims.len() && rights.claims.is_sorted_by(|a, b| a.0 < b.0));
        // A number beyond f64 is an error to serde_json, and text to us.
        if let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) {
            match &value["u"][0]["id"] {
                serde_json::Value::String(id) => assert_eq!(id, &*record.user),
                serde_json::Value::Number(_) => {}
                other => panic!("{other} is taken for a user"),
            }
            if let Some(permissions) = value["p"].as_array() {
                assert_eq!(permissions.len(), rights.permissions.len());
            }
        }
        let touched = Options { touch: true, ..OPTIONS.clone() };
        let touched = Record::parse(data, &touched, &claims).expect("the same record");
        assert_eq!(touched, record);
        let (seen, life) = (WallTime::from_secs(1), Duration::from_secs(9));
        assert_eq!(touched.ends(seen, Some(life), true), Some(seen + life));
        assert_eq!(touched.ends(seen, None, true), record.expires);
    }
    if let Some(ticket) = TicketRecord::parse(data)
        && let Some(text) = ticket.to_text()
    {
        assert_eq!(TicketRecord::parse(text.expose_secret()), Some(ticket));
    }
});
