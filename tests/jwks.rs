//! Tokens signed by others: public keys of the file, key sets of issuers over TLS and from files, rotation, outages, strangers,
//! against the built server.

mod support;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use support::server::{Answer, PATIENCE, Server, Setup, bearer, eventually, now_s, outcome, restcast, token_of};
use support::{Authority, Folder, Reply, Upstream};

const MS: Duration = Duration::from_millis(1);
/// How long after a fetch for an unknown key the next may begin.
const COOL_DOWN: Duration = Duration::from_secs(30);

/// A key of an issuer, of which the server gets the public half.
enum Signer {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair, SystemRandom),
}

impl Signer {
    fn ed25519() -> Signer {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        Signer::Ed25519(Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key"))
    }

    fn p256() -> Signer {
        let (scheme, chance) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(scheme, &chance).expect("a key");
        Signer::P256(EcdsaKeyPair::from_pkcs8(scheme, document.as_ref(), &chance).expect("a key"), chance)
    }

    fn jwk(&self, kid: &str) -> Value {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match self {
            Signer::Ed25519(pair) => {
                let x = encode(pair.public_key().as_ref());
                json!({ "kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid, "use": "sig", "alg": "EdDSA" })
            }
            Signer::P256(pair, _) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "x": encode(x), "y": encode(y), "kid": kid })
            }
        }
    }

    /// A token that lasts ten minutes.
    fn token(&self, kid: &str, claims: Value) -> String {
        let alg = match self {
            Signer::Ed25519(_) => "EdDSA",
            Signer::P256(..) => "ES256",
        };
        let mut all = json!({ "sub": "u1", "exp": now_s() + 600 });
        all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
        let parts = [json!({ "alg": alg, "kid": kid }), all];
        let text = parts.map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
        let signature = match self {
            Signer::Ed25519(pair) => pair.sign(text.as_bytes()),
            Signer::P256(pair, chance) => pair.sign(chance, text.as_bytes()).expect("a signature"),
        };
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

/// An upstream with a stream, and an issuer with key sets, over TLS.
struct World {
    data: Upstream,
    idp: Upstream,
    folder: Folder,
    ca: PathBuf,
}

impl World {
    fn new() -> World {
        let data = Upstream::start();
        data.set_json("/leads", "[1]");
        let authority = Authority::new();
        let idp = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
        let folder = Folder::new("jwks");
        let ca = authority.write_pem(&folder);
        World { data, idp, folder, ca }
    }

    fn setup(&self) -> Setup {
        Setup::new().limits("auth_failures_per_minute = 0").stream("leads", &self.data.url("/leads"), "")
    }

    /// The lines of an issuer whose set is at `path`.
    fn at(&self, path: &str) -> String {
        format!("url = {:?}\nca = {:?}\naudience = \"restcast\"", self.idp.url(path), self.ca.display().to_string())
    }
}

fn get(server: &Server, token: &str) -> (u16, String) {
    outcome(&server.get("/v1/streams/leads", &[bearer(token)]))
}

fn good() -> (u16, String) {
    (200, String::new())
}

fn refused() -> (u16, String) {
    (401, "INVALID_TOKEN".to_owned())
}

/// Claims of the issuer `iss` for this server.
fn of(iss: &str) -> Value {
    json!({ "iss": iss, "aud": "restcast" })
}

#[test]
fn what_the_command_mints_for_each_algorithm_the_server_accepts_by_the_public_key() {
    let keys = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/keys");
    let world = World::new();
    let mut setup = world.setup();
    let mut minted = Vec::new();
    for (alg, private, public) in [
        ("RS256", "rsa2048.pem", "rsa2048.pub.pem"),
        ("RS384", "rsa2048.pkcs1.pem", "rsa2048.pub.pkcs1.pem"),
        ("RS512", "rsa2048.pem", "rsa2048.cert.pem"),
        ("PS256", "rsa2048.pem", "rsa2048.pub.pem"),
        ("PS384", "rsa2048.pem", "rsa2048.pub.pem"),
        ("PS512", "rsa2048.pem", "rsa2048.pub.pem"),
        ("ES256", "p256.pem", "p256.pub.pem"),
        ("ES384", "p384.sec1.pem", "p384.pub.pem"),
        ("EdDSA", "ed25519.pem", "ed25519.pub.pem"),
    ] {
        setup = setup.public_key(alg, alg, &keys.join(public));
        let private = keys.join(private);
        let private = private.to_str().expect("UTF-8");
        let flags =
            ["token", "--sub", "u1", "--expires-in", "10m", "--alg", alg, "--kid", alg, "--secret-file", private];
        let (code, token, said) = restcast(&flags, "");
        assert_eq!((code, said.as_str()), (0, ""), "{alg}");
        minted.push((alg, token.trim_end().to_owned()));
    }
    let server = setup.start();
    for (alg, token) in &minted {
        assert_eq!(get(&server, token), good(), "{alg}");
        // Under the name of another key, or changed, it is nobody's.
        let (head, _) = token.split_once('.').expect("parts");
        let other = token.replacen(
            head,
            minted.iter().find(|(other, _)| other != alg).expect("one").1.split('.').next().expect("a head"),
            1,
        );
        assert_eq!(get(&server, &other), refused(), "{alg}");
        let changed = token.replace('.', "A.");
        assert_eq!(get(&server, &changed), refused(), "{alg}");
    }
    let (code, _, said) = restcast(
        &[
            "token",
            "--sub",
            "u",
            "--expires-in",
            "1m",
            "--alg",
            "ES256",
            "--secret-file",
            keys.join("rsa2048.pem").to_str().expect("UTF-8"),
        ],
        "",
    );
    assert_eq!(
        (code, said.as_str()),
        (1, "restcast: the private key is not of the kind that ES256 signs with, P-256\n")
    );
}

#[test]
fn a_key_set_is_there_before_the_server_is_ready() {
    let (world, key) = (World::new(), Signer::ed25519());
    let further =
        [json!({ "kty": "AKP", "kid": "pq" }), json!({ "kty": "oct", "k": "AAAA", "kid": "s" }), key.jwk("a")];
    world.idp.set("/jwks", Reply::json(set(&further)).header("Cache-Control", "max-age=600"));
    let server = world.setup().key_set("https://idp", &world.at("/jwks")).start();
    assert_eq!(world.idp.request_count(), 1);
    assert_eq!(get(&server, &key.token("a", of("https://idp"))), good());
    assert_eq!(get(&server, &token_of("u1")), good(), "and the keys of the file go on");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&key.token("a", of("https://idp")))]);
    assert_eq!(ws.next()["auth"]["sub"], "u1");
    assert_eq!(server.metric(&["key_set_fetches_total", "ok"]), 1.0);
    assert_eq!(server.metric(&["key_set_keys"]), 1.0);
    assert!(server.metric(&["key_set_age_seconds"]) < 60.0);
    assert_eq!(get(&server, &key.token("a", json!({ "iss": "https://idp", "aud": "another" }))), refused());
    assert_eq!(get(&server, &key.token("a", json!({ "iss": "https://idp" }))), refused());
    assert_eq!(world.idp.request_count(), 1, "a wrong audience is no unknown key");
}

#[test]
fn keys_of_two_issuers_do_not_cross_and_users_of_one_name_are_two() {
    let (world, a, b) = (World::new(), Signer::ed25519(), Signer::ed25519());
    world.idp.set_json("/a", &set(&[a.jwk("k")]));
    world.idp.set_json("/b", &set(&[b.jwk("k")]));
    let setup = world.setup().limits("connections_per_subject = 1");
    let server = setup.key_set("https://a", &world.at("/a")).key_set("https://b", &world.at("/b")).start();
    let tokens = [a.token("k", of("https://a")), b.token("k", of("https://b"))];
    for token in &tokens {
        assert_eq!(get(&server, token), good());
    }
    // Each has the other's `kid`, so that nothing is fetched: the keys are known, and are not its.
    for (key, iss) in [(&a, "https://b"), (&b, "https://a"), (&a, "https://c"), (&b, "")] {
        assert_eq!(get(&server, &key.token("k", of(iss))), refused(), "{iss}");
    }
    // A key of the file signs for no issuer that has a set.
    let own =
        support::server::mint(json!({ "sub": "u1", "exp": now_s() + 600, "iss": "https://a", "aud": "restcast" }));
    assert_eq!(get(&server, &own), refused());
    assert_eq!(
        get(&server, &support::server::mint(json!({ "sub": "u1", "exp": now_s() + 600, "iss": "https://c" }))),
        good()
    );
    // The same `sub` of another issuer is another: both have their one connection, and neither renews the other's.
    let mut of_a = server.ws("/v1/streams/leads", &[bearer(&tokens[0])]);
    let mut of_b = server.ws("/v1/streams/leads", &[bearer(&tokens[1])]);
    for ws in [&mut of_a, &mut of_b] {
        ws.next_of("snapshot");
    }
    of_a.send(json!({ "type": "auth_update", "token": tokens[1] }));
    assert_eq!(of_a.next()["code"], "AUTH_SUBJECT_MISMATCH");
    of_a.send(json!({ "type": "auth_update", "token": tokens[0] }));
    assert_eq!(of_a.next()["type"], "auth_ok");
}

#[test]
fn whoever_brings_a_new_key_waits_for_one_fetch_and_is_let_in() {
    let (world, old, new) = (World::new(), Signer::ed25519(), Signer::p256());
    world.idp.set_json("/jwks", &set(&[old.jwk("old")]));
    let setup = world.setup().auth("first_message = \"20s\"");
    let server = setup.key_set("https://idp", &world.at("/jwks")).start();
    let before = old.token("old", of("https://idp"));
    let mut live = server.ws("/v1/streams/leads", &[bearer(&before)]);
    live.next_of("snapshot");
    let mut events = server.sse("/v1/streams/leads", &[bearer(&before)]);
    let connection = events.next().expect("an event").data["connection"].as_str().expect("a name").to_owned();
    // The issuer rotates, and takes its time to say so.
    world.idp.set("/jwks", Reply::json(set(&[old.jwk("old"), new.jwk("new")])).delay(700 * MS));
    let after = new.token("new", of("https://idp"));
    let mut late = server.ws("/v1/streams/leads", &[]);
    let begun = Instant::now();
    late.send(json!({ "type": "auth", "token": after }));
    live.send(json!({ "type": "auth_update", "token": after, "id": 7 }));
    thread::scope(|scope| {
        let asking: Vec<_> = (0..12).map(|_| scope.spawn(|| get(&server, &after))).collect();
        let upgrading: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| server.ws("/v1/streams/leads", &[bearer(&after)]).next_of("snapshot")["data"].clone())
            })
            .collect();
        let renewing = scope.spawn(|| {
            let body = json!({ "token": after }).to_string();
            let headers = [("Content-Type", "application/json".to_owned())];
            server.request("POST", &format!("/v1/connections/{connection}/auth"), &headers, &body).status
        });
        // Whoever comes with a key that is known does not wait with them.
        assert_eq!(get(&server, &before), good());
        for one in asking {
            assert_eq!(one.join().expect("no panic"), good());
        }
        for one in upgrading {
            assert_eq!(one.join().expect("no panic"), json!([1]));
        }
        assert_eq!(renewing.join().expect("no panic"), 200);
    });
    assert!(begun.elapsed() >= 650 * MS, "they have waited");
    assert_eq!(late.next()["type"], "welcome");
    let ok = live.next_of("auth_ok");
    assert_eq!(ok["id"], 7);
    assert_eq!(world.idp.request_count(), 2, "one at the start, one for them all");
    // In the cool-down the next unknown key is refused at once.
    let unknown = Signer::ed25519().token("newer", of("https://idp"));
    let asked = Instant::now();
    assert_eq!(get(&server, &unknown), refused());
    live.send(json!({ "type": "auth_update", "token": unknown }));
    let error = live.next_of("error");
    assert_eq!((&error["code"], &error["reason"]), (&json!("AUTH_UPDATE_REJECTED"), &json!("unknown_kid")));
    assert!(asked.elapsed() < COOL_DOWN / 2);
    assert_eq!(world.idp.request_count(), 2);
}

#[test]
fn a_storm_of_unknown_keys_costs_the_issuer_one_request() {
    let (world, key, stranger) = (World::new(), Signer::ed25519(), Signer::ed25519());
    world.idp.set_json("/jwks", &set(&[key.jwk("a")]));
    let server = world.setup().key_set("https://idp", &world.at("/jwks")).start();
    world.idp.set("/jwks", Reply::json(set(&[key.jwk("a")])).delay(300 * MS));
    let begun = Instant::now();
    let (server_, stranger_) = (&server, &stranger);
    thread::scope(|scope| {
        for of_thread in 0..8 {
            scope.spawn(move || {
                for n in 0..40 {
                    let token = stranger_.token(&format!("{of_thread}-{n}"), of("https://idp"));
                    assert_eq!(get(server_, &token), refused());
                }
            });
        }
        for _ in 0..20 {
            assert_eq!(get(server_, &key.token("a", of("https://idp"))), good());
        }
    });
    // One at the start, then one for as many cool-downs as have begun.
    let allowed = 2 + (begun.elapsed().as_secs() / COOL_DOWN.as_secs()) as usize;
    let seen = world.idp.request_count();
    assert!((2..=allowed).contains(&seen), "{seen} requests for 320 strangers in {:?}", begun.elapsed());
}

#[test]
fn an_issuer_that_is_away_holds_nothing_up_and_is_heard_when_it_is_back() {
    let (world, key) = (World::new(), Signer::ed25519());
    world.idp.set("/jwks", Reply::status(503));
    let server = world.setup().key_set("https://idp", &world.at("/jwks")).start();
    let said = server.wait_for_log("The key set cannot be fetched; the issuer's tokens are refused until it can.", 1);
    assert!(said.contains("https://idp") && said.contains("503"), "{said}");
    assert_eq!(get(&server, &token_of("u1")), good(), "others are served");
    let token = key.token("a", of("https://idp"));
    assert_eq!(get(&server, &token), refused());
    // It is asked again by itself, later and later; what it says that is no set counts as nothing.
    world.idp.once("/jwks", Reply::body("text/html", "<h1>sorry</h1>"));
    world.idp.once("/jwks", Reply::json("{\"keys\":7}"));
    world.idp.once("/jwks", Reply::status(302).header("Location", "/elsewhere"));
    world.idp.set_json("/jwks", &set(&[key.jwk("a")]));
    eventually("it is back", || (get(&server, &token) == good()).then_some(()));
    assert!(server.metric(&["key_set_fetches_total", "failed"]) >= 3.0);
    // Away again: the last set stays in force, for unknown keys too.
    world.idp.set("/jwks", Reply::status(500));
    let before = world.idp.request_count();
    let until = Instant::now() + COOL_DOWN + PATIENCE;
    let unknown = Signer::ed25519().token("other", of("https://idp"));
    while world.idp.request_count() == before {
        assert_eq!(get(&server, &unknown), refused());
        assert!(Instant::now() < until, "the cool-down of the first fetch passes");
        thread::sleep(50 * MS);
    }
    server.wait_for_log("The key set cannot be fetched; the last one stays in force.", 1);
    assert_eq!(get(&server, &token), good());
}

#[test]
fn a_key_that_leaves_the_set_ends_its_connections_where_that_is_wanted() {
    let (world, old, new) = (World::new(), Signer::ed25519(), Signer::ed25519());
    world.idp.set_json("/jwks", &set(&[old.jwk("old"), new.jwk("kept")]));
    for close in [false, true] {
        let setup = world.setup().jwt(&format!("close_on_key_removal = {close}"));
        world.idp.set_json("/jwks", &set(&[old.jwk("old"), new.jwk("kept")]));
        let server = setup.key_set("https://idp", &world.at("/jwks")).start();
        let mut by_old = server.ws("/v1/streams/leads", &[bearer(&old.token("old", of("https://idp")))]);
        let mut by_kept = server.ws("/v1/streams/leads", &[bearer(&new.token("kept", of("https://idp")))]);
        // On every core, so that each has it in mind.
        let old_token = old.token("old", of("https://idp"));
        (0..12).for_each(|_| assert_eq!(get(&server, &old_token), good()));
        by_old.next_of("snapshot");
        by_kept.next_of("snapshot");
        // The next fetch, which an unknown key asks for, brings the set without the old key.
        world.idp.set_json("/jwks", &set(&[new.jwk("kept"), new.jwk("new")]));
        assert_eq!(get(&server, &new.token("new", of("https://idp"))), good());
        eventually("both cores have the new set", || {
            (0..12).all(|_| get(&server, &old_token) == refused()).then_some(())
        });
        if close {
            assert_eq!(by_old.closed(), (4001, "key_removed".into()));
        } else {
            assert!(by_old.is_quiet_for(300 * MS));
        }
        assert!(by_kept.is_quiet_for(50 * MS));
    }
}

#[test]
fn a_reload_reads_files_anew_and_takes_issuers_in_and_out() {
    let (world, a, b) = (World::new(), Signer::ed25519(), Signer::p256());
    let put = |text: &str| world.folder.put("jwks.json", text);
    let from_file = format!("file = {:?}\naudience = \"restcast\"", put(&set(&[a.jwk("a")])));
    let setup = world.setup().jwt("close_on_key_removal = true");
    let one = setup.clone().key_set("https://file", &from_file);
    let server = one.start();
    let by_a = a.token("a", of("https://file"));
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&by_a)]);
    ws.next_of("snapshot");
    assert_eq!(get(&server, &b.token("b", of("https://file"))), refused());
    put(&set(&[a.jwk("a"), b.jwk("b")]));
    server.reload(&one);
    eventually("the new key is known", || (get(&server, &b.token("b", of("https://file"))) == good()).then_some(()));
    assert!(ws.is_quiet_for(50 * MS), "its key is still there");
    // A broken file is reported, and the old set stays.
    put("{");
    server.reload(&one);
    server.wait_for_log("is no key set: it is not JSON", 1);
    assert_eq!(get(&server, &by_a), good());
    // Another issuer, fetched at once; the first one loses the key.
    world.idp.set_json("/jwks", &set(&[b.jwk("b")]));
    put(&set(&[b.jwk("b")]));
    let both = one.clone().key_set("https://idp", &world.at("/jwks"));
    server.reload(&both);
    assert_eq!(ws.closed(), (4001, "key_removed".into()));
    let by_idp = b.token("b", of("https://idp"));
    eventually("the issuer is known", || (get(&server, &by_idp) == good()).then_some(()));
    assert_eq!(get(&server, &by_a), refused());
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&by_idp)]);
    ws.next_of("snapshot");
    let asked = world.idp.request_count();
    server.reload(&both);
    assert_eq!(get(&server, &by_idp), good());
    assert_eq!(world.idp.request_count(), asked, "what has not changed is not fetched anew");
    assert!(ws.is_quiet_for(50 * MS));
    server.reload(&setup);
    assert_eq!(ws.closed(), (4001, "key_removed".into()), "its issuer is gone");
    assert_eq!(get(&server, &by_idp), refused());
}

#[test]
fn a_set_from_a_url_that_a_reload_took_away_verifies_nothing_and_the_new_one_is_waited_for() {
    let (world, gone, kept) = (World::new(), Signer::ed25519(), Signer::ed25519());
    world.idp.set_json("/old", &set(&[gone.jwk("gone"), kept.jwk("kept")]));
    let setup = world.setup().jwt("close_on_key_removal = true");
    let server = setup.clone().key_set("https://idp", &world.at("/old")).start();
    let (by_gone, by_kept) = (gone.token("gone", of("https://idp")), kept.token("kept", of("https://idp")));
    let mut watching = [&by_gone, &by_kept].map(|token| {
        let mut ws = server.ws("/v1/streams/leads", &[bearer(token)]);
        ws.next_of("snapshot");
        ws
    });
    // The new place answers late: until it does nobody is let in by what the old one said, nor turned away.
    let late = Duration::from_secs(2);
    world.idp.set("/new", Reply::json(set(&[kept.jwk("kept")])).delay(late));
    let begun = Instant::now();
    server.reload(&setup.key_set("https://idp", &world.at("/new")));
    let answers = thread::scope(|scope| {
        let asked = [&by_gone, &by_kept].map(|token| {
            let server = &server;
            scope.spawn(move || (get(server, token), begun.elapsed()))
        });
        asked.map(|asked| asked.join().expect("an answer"))
    });
    assert_eq!((&answers[0].0, &answers[1].0), (&refused(), &good()));
    assert!(answers.iter().all(|(_, took)| *took >= late), "they waited for the new set: {answers:?}");
    // Whose key is in the new set too has noticed nothing.
    assert_eq!(watching[0].closed(), (4001, "key_removed".into()));
    assert!(watching[1].is_quiet_for(50 * MS));
}

#[test]
fn public_keys_of_the_file_rotate_like_secrets() {
    let keys = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/keys");
    let world = World::new();
    let setup = world.setup().jwt("close_on_key_removal = true");
    let mint = |alg: &str, kid: &str, private: &str| {
        let private = keys.join(private);
        let private = private.to_str().expect("UTF-8");
        let flags =
            ["token", "--sub", "u1", "--expires-in", "10m", "--alg", alg, "--kid", kid, "--secret-file", private];
        restcast(&flags, "").1.trim_end().to_owned()
    };
    let (one, two) = (mint("ES256", "one", "p256.pem"), mint("EdDSA", "two", "ed25519.pem"));
    let first = setup.clone().public_key("one", "ES256", &keys.join("p256.pub.pem"));
    let both = first.clone().public_key("two", "EdDSA", &keys.join("ed25519.pub.pem"));
    let second = setup.public_key("two", "EdDSA", &keys.join("ed25519.pub.pem"));
    let server = first.start();
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&one)]);
    ws.next_of("snapshot");
    assert_eq!(get(&server, &two), refused());
    server.reload(&both);
    eventually("both are in force", || (get(&server, &two) == good()).then_some(()));
    assert_eq!(get(&server, &one), good());
    let mut kept = server.ws("/v1/streams/leads", &[bearer(&two)]);
    kept.next_of("snapshot");
    server.reload(&second);
    assert_eq!(ws.closed(), (4001, "key_removed".into()));
    assert_eq!((get(&server, &one), get(&server, &two)), (refused(), good()));
    assert!(kept.is_quiet_for(50 * MS));
}

#[test]
fn explain_fetches_key_sets_and_says_whose_key_it_was() {
    let (world, key) = (World::new(), Signer::ed25519());
    world.idp.set_json("/jwks", &set(&[key.jwk("a")]));
    let file = world.folder.put("jwks.json", &set(&[key.jwk("f")]));
    let setup = world.setup().key_set("https://idp", &world.at("/jwks"));
    let setup = setup.key_set("https://file", &format!("file = {file:?}"));
    let config = world.folder.put("restcast.toml", &setup.text());
    let explain = |token: &str| restcast(&["explain", "token", "--config", &config], token);
    let (code, told, said) = explain(&key.token("a", of("https://idp")));
    assert_eq!((code, said.as_str()), (0, ""));
    assert!(
        told.starts_with("accepted: signed with EdDSA by the key \"a\" of the issuer \"https://idp\", it expires"),
        "{told}"
    );
    assert!(explain(&key.token("f", of("https://file"))).1.contains("by the key \"f\" of the issuer \"https://file\""));
    let (code, told, _) = explain(&key.token("b", of("https://idp")));
    assert_eq!(code, 1);
    assert!(told.starts_with("refused: no key has the token's kid (unknown_kid, INVALID_TOKEN)"), "{told}");
    world.idp.set("/jwks", Reply::status(500));
    let (code, told, said) = explain(&key.token("a", of("https://idp")));
    assert_eq!((code, told.starts_with("refused: ")), (1, true), "{told}");
    assert!(said.contains("the key set of \"https://idp\" cannot be fetched: the status is 500, not 200"), "{said}");
}

#[test]
fn no_answer_or_line_tells_a_token() {
    let (world, key) = (World::new(), Signer::ed25519());
    world.idp.set_json("/jwks", &set(&[key.jwk("a")]));
    let server = world.setup().key_set("https://idp", &world.at("/jwks")).start();
    let good = key.token("a", of("https://idp"));
    let unknown = key.token("b", of("https://idp"));
    let answers: Vec<Answer> = [&good, &unknown].map(|token| server.get("/v1/streams/leads", &[bearer(token)])).into();
    let seen = format!("{answers:?}{}{}", server.metrics(), server.log_text());
    for token in [good, unknown] {
        for part in token.split('.') {
            assert!(!seen.contains(part), "{part}");
        }
    }
}
