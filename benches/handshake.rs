//! What opening a WebSocket costs: its request parsed, its token verified, and the whole of it through a shard.

mod hall;

use std::collections::VecDeque;
use std::hint::black_box;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use restcast::auth::cache::TokenCache;
use restcast::auth::control::{ControlEntry, Event};
use restcast::auth::grant::RightsTable;
use restcast::auth::jwt::{Options, Verifier};
use restcast::auth::keys::{Algorithm, Key, KeySet};
use restcast::auth::marks::Marks;
use restcast::auth::public_key::PublicKey;
use restcast::auth::signing::SigningKey;
use restcast::codec::http::parse_head;
use restcast::connection::handshake::{demand, presented};
use restcast::secret::Secret;
use ring::rand::SystemRandom;

use hall::{Hall, key, options, start, token, upgrade};

/// Keys of the tests, and their public halves.
const RSA: &[u8] = include_bytes!("../tests/vectors/keys/rsa2048.pem");
const RSA_PUBLIC: &[u8] = include_bytes!("../tests/vectors/keys/rsa2048.pub.pem");
const P256: &[u8] = include_bytes!("../tests/vectors/keys/p256.pem");
const P256_PUBLIC: &[u8] = include_bytes!("../tests/vectors/keys/p256.pub.pem");

/// Connections that stay open while others come and go.
const OPEN: usize = 1_000;

fn parse(c: &mut Criterion) {
    let options = options();
    let bytes = upgrade(&token(&key(), 1));
    let mut group = c.benchmark_group("handshake");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("head", |b| {
        b.iter(|| parse_head(black_box(&bytes), 16 << 10).expect("a head").expect("the whole of it"));
    });
    group.bench_function("head, demand and credential", |b| {
        b.iter(|| {
            let (head, _) = parse_head(black_box(&bytes), 16 << 10).expect("a head").expect("the whole of it");
            let demand = demand(&head, &options.connection).expect("a WebSocket is demanded");
            let presented = presented(&head, &options.auth).expect("a credential");
            black_box((demand, presented));
        });
    });
    group.finish();
}

fn verify(c: &mut Criterion) {
    let verifier = Verifier::new(options().auth.jwt);
    let token = token(&key(), 1);
    let mut group = c.benchmark_group("jwt");
    group.throughput(Throughput::Elements(1));
    group.bench_function("HS256, typical claims", |b| {
        b.iter(|| verifier.verify(black_box(token.as_bytes()), start().wall).expect("a valid token"));
    });
    let mut forged = token.clone().into_bytes();
    *forged.last_mut().expect("a signature") ^= 4;
    group.bench_function("HS256, forged", |b| {
        b.iter(|| verifier.verify(black_box(&forged), start().wall).expect_err("another signature"));
    });
    let grant = verifier.verify(token.as_bytes(), start().wall).expect("a valid token");
    let mut rights = RightsTable::default();
    let grant = grant.into_grant(&mut rights, &[]);
    let leeway = verifier.options().leeway;
    let mut cache = TokenCache::new(4096, [7; 32]);
    cache.keep(token.as_bytes(), &grant, start().wall, &mut rights);
    group.bench_function("remembered", |b| {
        b.iter(|| cache.find(black_box(token.as_bytes()), start().wall, leeway).expect("it was kept"));
    });
    // What is asked besides where somebody has logged out.
    let marks = Marks::default();
    let entry = ControlEntry::user_logged_out("somebody", None, start().wall);
    for event in Event::read(&entry, start().wall).expect("an event") {
        marks.take(&event, start().wall);
    }
    group.bench_function("judged by marks", |b| {
        b.iter(|| (marks.judge(black_box(&grant), start().wall), marks.rights_of(&grant, start().wall)));
    });
    group.finish();
}

/// A verifier with one public key of the tests', and a token signed by its private half.
fn asymmetric(algorithm: Algorithm, private: &[u8], public: &[u8]) -> (Verifier, String) {
    let chance = SystemRandom::new();
    let signing = SigningKey::new(Some("k"), algorithm, &Secret::new(private), &chance).expect("a private key");
    let public = PublicKey::read(public).expect("a public key");
    let key = Key::public("", Some("k"), algorithm, &public).expect("a key of its kind");
    let jwt = Options { keys: KeySet::of(vec![key]).expect("one key"), ..options().auth.jwt };
    // The claims are those of the other benches.
    let claims = token(&hall::key(), 1).split('.').nth(1).expect("a payload").to_owned();
    let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{}","kid":"k","typ":"JWT"}}"#, algorithm.name()));
    let signed = format!("{header}.{claims}");
    let signature = signing.sign(signed.as_bytes(), &chance).expect("a signature");
    (Verifier::new(jwt), format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// What remembering saves where a signature costs more than a hash: a token verified, and the same token remembered.
fn verify_asymmetric(c: &mut Criterion) {
    let mut group = c.benchmark_group("jwt");
    group.throughput(Throughput::Elements(1));
    for (algorithm, private, public) in [(Algorithm::Rs256, RSA, RSA_PUBLIC), (Algorithm::Es256, P256, P256_PUBLIC)] {
        let (verifier, token) = asymmetric(algorithm, private, public);
        let name = algorithm.name();
        group.bench_function(format!("{name}, typical claims"), |b| {
            b.iter(|| verifier.verify(black_box(token.as_bytes()), start().wall).expect("a valid token"));
        });
        // The last character of a signature may hold bits that count for nothing, the one in its middle does not.
        let mut forged = token.clone().into_bytes();
        let middle = token.rfind('.').map(|dot| (dot + token.len()) / 2).expect("a signature");
        forged[middle] = if forged[middle] == b'A' { b'B' } else { b'A' };
        group.bench_function(format!("{name}, forged"), |b| {
            b.iter(|| verifier.verify(black_box(&forged), start().wall).expect_err("another signature"));
        });
        let mut rights = RightsTable::default();
        let verified = verifier.verify(token.as_bytes(), start().wall).expect("a valid token");
        let grant = verified.into_grant(&mut rights, &[]);
        let leeway = verifier.options().leeway;
        let mut cache = TokenCache::new(4096, [7; 32]);
        cache.keep(token.as_bytes(), &grant, start().wall, &mut rights);
        group.bench_function(format!("{name}, remembered"), |b| {
            b.iter(|| cache.find(black_box(token.as_bytes()), start().wall, leeway).expect("it was kept"));
        });
    }
    group.finish();
}

/// Bytes of the request to answer, welcome and snapshot, each with a token of its own; and the end of another connection.
fn whole(c: &mut Criterion) {
    let mut hall = Hall::new();
    let mut open = VecDeque::new();
    for no in 0..OPEN as u64 {
        open.push_back(hall.open(&mut upgrade(&hall.token(no))));
    }
    hall.poll(br#"{"items":[{"id":1,"status":"open"},{"id":2,"status":"won"}]}"#.to_vec());
    hall.deliver();
    let mut no = OPEN as u64;
    let mut group = c.benchmark_group("handshake");
    group.throughput(Throughput::Elements(1));
    group.bench_function("whole, with its teardown", |b| {
        b.iter_batched_ref(
            || {
                no += 1;
                upgrade(&token(&key(), no))
            },
            |request| {
                let oldest = open.pop_front().expect("a connection");
                hall.lose(oldest);
                open.push_back(hall.open(request));
            },
            BatchSize::SmallInput,
        );
    });
    assert_eq!(hall.connections(), OPEN);
    group.finish();
}

criterion_group!(benches, parse, verify, verify_asymmetric, whole);
criterion_main!(benches);
