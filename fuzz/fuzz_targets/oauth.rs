//! Answers of a token endpoint, and the times of a credential. The first byte says which: a status and an answer's body, of
//! which what is taken fits a header; or what those who need a token, upstreams and the endpoint do one after the other.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use restcast::codec::json::Document;
use restcast::limits::{OAUTH_SPACING, OAUTH_TOKEN_BYTES_MAX};
use restcast::secret::Secret;
use restcast::stream::oauth::{Ask, Granted, Renewal, Why, read};
use restcast::time::Instant;

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((&choice @ 0..4, body)) => answer([200, 400, 401, 503][usize::from(choice)], body),
        Some((_, deeds)) => times(deeds),
        None => {}
    }
});

fn answer(status: u16, body: &[u8]) {
    let outcome = read(status, body);
    assert_eq!(outcome, read(status, body));
    match outcome {
        Ok(Granted { access_token, refresh_token, life }) => {
            assert_eq!(status, 200);
            assert!(Document::parse(body).is_ok(), "it is JSON");
            // A number that no double holds may stand in a member that nobody reads.
            let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else { return };
            let text = |secret: &Secret| String::from_utf8(secret.expose_secret().to_vec()).expect("it is ASCII");
            assert_eq!(value["access_token"].as_str(), Some(&*text(&access_token)));
            assert!(value["token_type"].as_str().is_some_and(|kind| kind.eq_ignore_ascii_case("bearer")));
            let fits = |secret: &Secret| (1..=OAUTH_TOKEN_BYTES_MAX).contains(&secret.expose_secret().len());
            assert!(fits(&access_token) && access_token.expose_secret().iter().all(u8::is_ascii_graphic));
            assert!(refresh_token.is_none_or(|token| fits(&token) && !text(&token).contains(|c: char| c.is_control())));
            let mut renewal = Renewal::default();
            assert_eq!(renewal.ask(at(0)), Ask::Renew);
            let token = renewal.brought(at(1), &Granted { access_token, refresh_token: None, life }, 1000);
            assert_eq!(renewal.ask(at(2)), Ask::Use(token), "however long it is good, it is for a while");
        }
        // What is told of a refusal is of our own words.
        Err(why) => assert!(matches!(why, Why::Refused { .. } | Why::Status { .. } | Why::Malformed { .. })),
    }
}

const fn at(ms: u64) -> Instant {
    Instant::from_micros((1_000_000 + ms) * 1_000)
}

/// One credential: each pair of bytes is a deed and how much.
fn times(deeds: &[u8]) {
    let mut renewal = Renewal::default();
    let (mut now_ms, mut under_way, mut begun_ms) = (0, false, None::<u64>);
    let (mut good_until_ms, mut generation) = (None::<Option<u64>>, 0);
    let spacing_ms = OAUTH_SPACING.as_millis() as u64;
    for deed in deeds.chunks_exact(2).take(1_000) {
        let much = u64::from(deed[1]);
        let is_good = |now_ms: u64| good_until_ms.is_some_and(|until| until.is_none_or(|until| now_ms < until));
        match deed[0] % 6 {
            0 => now_ms += much,
            1 => now_ms += much * 100,
            which @ (2 | 3) => {
                let refused = which == 3;
                let asked = if refused { renewal.refused(at(now_ms), generation) } else { renewal.ask(at(now_ms)) };
                match asked {
                    Ask::Use(token) => {
                        assert!(
                            !refused && is_good(now_ms) && token.generation == generation,
                            "the one that is refused"
                        );
                    }
                    begins @ (Ask::UseAndRenew(_) | Ask::Renew) => {
                        assert!(!under_way, "one renewal at a time");
                        let spaced = begun_ms.is_none_or(|begun_ms| now_ms >= begun_ms + spacing_ms);
                        assert!(spaced, "at most one a second, whatever upstreams answer");
                        (under_way, begun_ms) = (true, Some(now_ms));
                        if let Ask::UseAndRenew(token) = begins {
                            assert!(!refused && is_good(now_ms) && token.generation == generation);
                        } else {
                            assert!(refused || !is_good(now_ms), "whoever has a good token does not wait");
                        }
                    }
                    Ask::Wait => assert!(under_way && (refused || !is_good(now_ms))),
                    Ask::None(_) => assert!(!under_way && (refused || !is_good(now_ms))),
                }
            }
            4 if under_way => {
                let life = (much < 250).then(|| Duration::from_secs(much));
                let (access_token, refresh_token) = (Secret::new("t"), None);
                let granted = Granted { access_token, refresh_token, life };
                generation = renewal.brought(at(now_ms), &granted, deed[1].into()).generation;
                // A token of no life at all would be asked for without end.
                let since_ms = begun_ms.expect("it was begun");
                good_until_ms = Some(life.map(|life| since_ms + life.as_millis().max(2_000) as u64));
                under_way = false;
            }
            5 if under_way => {
                let retry_after = (much > 128).then(|| Duration::from_secs(much));
                renewal.failed(at(now_ms), Why::Status { status: 503 }, retry_after, deed[1].into());
                under_way = false;
            }
            _ => renewal.hurry(),
        }
        assert_eq!(renewal.is_idle(), !under_way);
    }
}
