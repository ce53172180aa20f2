//! Worlds that follow a script, of streams that callers describe and of ephemeral sessions; each with sessions of one process
//! and with sessions that processes share.

use super::client::{Carrier, Held, Kind, Login};
use super::dice::Dice;
use super::direct::{PLAIN, SESSIONS_EACH, TARGETS, TTL_MAX_S, name_of};
use super::law::{Rights, Token, User, What};
use super::upstream::Mood;
use super::world::{SECOND_US, Setup, World};

const HOUR_US: u64 = 3_600 * SECOND_US;
/// The target that nobody may name.
const BLOCKED: usize = 4;

fn held(choice: Option<usize>) -> Held {
    Held { format: "patch".to_owned(), state: "live".to_owned(), choice, ..Held::default() }
}

fn world(shares: bool) -> World {
    let setup = Setup { cores: 2, clients: 80, shares, direct_linger_ms: 3_000, ..Setup::plain() };
    let mut world = World::with(Dice::seeded(1), setup);
    world.book.upstream.mood = Mood::Calm;
    world.book.store.is_reliable = true;
    world.fetch_us_max = 1;
    world.store_us_max = 5_000;
    world
}

fn login(world: &World, sub: &str, jti: &str, life_us: u64) -> Login {
    let rights = Rights::of(&["viewer"], &[]);
    let token = Token { rights, jti: Some(jti.to_owned()), ..world.plain_token(0, life_us) };
    Login { issuer: None, sub: sub.to_owned(), token, carrier: Carrier::Header }
}

/// Somebody who speaks HTTP.
fn asker(world: &mut World, sub: &str, jti: &str, life_us: u64) -> usize {
    let login = login(world, sub, jti, life_us);
    world.open_as(Kind::Json, 0, login, "", Held::default(), 0).expect("there is room")
}

/// Has a session made, by that name if any; its place.
fn made(world: &mut World, asker: usize, target: usize, dedupe: Option<u64>, ttl_s: Option<u64>) -> usize {
    world.make_session(asker, target, None, dedupe, ttl_s);
    world.idle(SECOND_US / 10);
    world.book.direct.sessions.len() - 1
}

fn watches(world: &mut World, kind: Kind, core: usize, place: usize) -> usize {
    let name = name_of(world.book.direct.sessions[place].target);
    world.open_by_session(kind, core, place, &name, held(None), 0).expect("there is room")
}

fn closed(world: &World, clients: &[usize]) -> Vec<Option<u16>> {
    clients.iter().map(|client| world.clients[*client].closed).collect()
}

fn times(world: &World, what: &str) -> u64 {
    world.book.tally.get(what).copied().unwrap_or(0)
}

/// Every value one version further, polled and delivered.
fn change(world: &mut World) {
    let mut dice = Dice::seeded(3);
    world.book.upstream.renew_all(&mut dice);
    world.idle(2 * SECOND_US);
}

/// Whether a token opens its session's stream.
fn opens(world: &mut World, place: usize) -> bool {
    let client = watches(world, Kind::Single, 1, place);
    world.idle(SECOND_US);
    let opens = world.clients[client].welcomed && world.clients[client].closed.is_none();
    if world.clients[client].closed.is_none() {
        world.end(client, false);
    }
    opens
}

#[test]
fn who_describes_the_same_shares_a_poll_and_whoever_differs_in_anything_has_another() {
    for shares in [false, true] {
        let mut world = world(shares);
        let mut clients = Vec::new();
        // Six of each, by chance in one form or another, spelled in one way or another.
        for n in 0..6 {
            for target in (0..TARGETS.len()).filter(|target| *target != BLOCKED) {
                let login = login(&world, &format!("u{n}"), &format!("t{n}.{target}"), HOUR_US);
                let kind = [Kind::Single, Kind::Events][n % 2];
                let client = world.open_described(kind, n / 2 % 2, login, target, held(None), 0);
                clients.push((target, client.expect("there is room")));
            }
        }
        world.idle(3 * SECOND_US);
        change(&mut world);
        let mut places = std::collections::BTreeMap::new();
        for (target, client) in &clients {
            let held = &world.clients[*client].held[&name_of(*target)];
            let place = (held.epoch.clone(), held.seq);
            assert_eq!(*places.entry(*target).or_insert_with(|| place.clone()), place, "target {target}");
        }
        let epochs: std::collections::BTreeSet<_> = places.values().map(|(epoch, _)| epoch).collect();
        assert_eq!(epochs.len(), TARGETS.len() - 1, "each target is a stream of its own");
        let polls = world.fetches;
        world.idle(10 * SECOND_US);
        // All but one are polled each half second.
        let fetched = world.fetches - polls;
        let expected = 20 * (TARGETS.len() as u64 - 2) + 10;
        assert!(fetched <= expected + TARGETS.len() as u64, "{fetched} polls, {expected} expected");
        world.rest();
        world.leave();
    }
}

#[test]
fn a_blocked_target_is_refused_in_every_form_and_never_polled() {
    let mut world = world(false);
    let clients: Vec<usize> = [Kind::Single, Kind::Events]
        .repeat(6)
        .into_iter()
        .enumerate()
        .map(|(n, kind)| {
            let login = login(&world, "u1", &format!("t{n}"), HOUR_US);
            world.open_described(kind, 0, login, BLOCKED, held(None), 0).expect("there is room")
        })
        .collect();
    let asker = asker(&mut world, "u1", "t", HOUR_US);
    for _ in 0..2 {
        world.ask_for_described(asker, BLOCKED, None, None, None);
    }
    world.make_session(asker, BLOCKED, None, None, None);
    world.idle(2 * SECOND_US);
    assert!(closed(&world, &clients).iter().all(|code| matches!(code, Some(403 | 4003))));
    assert_eq!(world.fetches, 0);
    assert_eq!(times(&world, "error TARGET_BLOCKED") + times(&world, "answer 403 TARGET_BLOCKED"), 15);
}

#[test]
fn a_session_ends_at_its_time_and_its_token_is_good_for_nothing_then() {
    for shares in [false, true] {
        let mut world = world(shares);
        let asker = asker(&mut world, "u1", "t1", 5 * SECOND_US);
        let place = made(&mut world, asker, 6, None, Some(10));
        let long = made(&mut world, asker, 6, None, Some(3_600));
        let clients = [(Kind::Single, 0), (Kind::Events, 1)].map(|(kind, core)| watches(&mut world, kind, core, place));
        let other = watches(&mut world, Kind::Single, 1, long);
        world.idle(9 * SECOND_US);
        assert_eq!(closed(&world, &clients), [None; 2], "its maker's token has ended, and it has not");
        world.idle(SECOND_US);
        assert_eq!(closed(&world, &clients), [Some(4004); 2]);
        assert_eq!(closed(&world, &[other]), [None], "another with the same stream goes on");
        assert!(!opens(&mut world, place) && opens(&mut world, long));
        world.idle(TTL_MAX_S * SECOND_US);
        assert_eq!(closed(&world, &[other]), [Some(4004)], "no longer than any may be");
        world.leave();
    }
}

#[test]
fn a_session_lingers_after_its_last_watcher_and_who_comes_back_in_time_goes_on_where_they_were() {
    for shares in [false, true] {
        let mut world = world(shares);
        let asker = asker(&mut world, "u1", "t1", HOUR_US);
        let place = made(&mut world, asker, 8, Some(0), None);
        let name = name_of(8);
        world.idle(8 * SECOND_US);
        let first = watches(&mut world, Kind::Single, 0, place);
        world.idle(2 * SECOND_US);
        let before = world.clients[first].held[&name].clone();
        world.end(first, false);
        world.idle(SECOND_US / 2);
        change(&mut world);
        let since = Held { resumes: true, ..before.clone() };
        let back = world.open_by_session(Kind::Events, 1, place, &name, since, 0).expect("there is room");
        world.idle(SECOND_US);
        let now = &world.clients[back].held[&name];
        assert_eq!((&now.epoch, now.seq), (&before.epoch, before.seq + 1));
        assert_eq!(times(&world, "described resumed"), 1, "by the one event that was missed");
        world.end(back, false);
        world.idle(2 * SECOND_US);
        assert!(made(&mut world, asker, 8, Some(0), None) == place, "it is there still");
        // And gone a while later: the model counts, in a store a minute more.
        world.idle(if shares { 7 } else { 2 } * SECOND_US);
        assert!(!opens(&mut world, place));
        assert!(made(&mut world, asker, 8, Some(0), None) > place, "by the same name there is another");
        world.leave();
    }
}

#[test]
fn whatever_ends_its_makers_rights_ends_a_session_and_its_token() {
    for shares in [false, true] {
        let mut world = world(shares);
        let user = |sub: &str| User { issuer: None, sub: sub.to_owned() };
        let none = What::Rights { user: user("u3"), roles: Some(Vec::new()), permissions: None };
        let ends = [
            ("u1", What::LoggedOut(user("u1")), 4010),
            ("u2", What::Revoked { issuer: None, jti: "t-u2".to_owned(), exp_s: None }, 4010),
            ("u3", none, 4003),
        ];
        for (sub, what, code) in ends {
            let asker = asker(&mut world, sub, &format!("t-{sub}"), HOUR_US);
            let place = made(&mut world, asker, 10, None, None);
            let login = login(&world, sub, &format!("t-{sub}"), HOUR_US);
            let own = world.open_described(Kind::Single, 1, login, 6, held(None), 0).expect("there is room");
            let clients =
                [own, watches(&mut world, Kind::Single, 1, place), watches(&mut world, Kind::Events, 0, place)];
            world.idle(2 * SECOND_US);
            assert_eq!(closed(&world, &clients), [None; 3]);
            world.decree_at_once(what);
            world.idle(SECOND_US);
            assert_eq!(closed(&world, &clients), [Some(code); 3], "{sub}");
            assert!(!opens(&mut world, place), "{sub}");
        }
        world.leave();
    }
}

#[test]
fn a_session_that_its_maker_ends_is_over_at_once_on_every_core() {
    for shares in [false, true] {
        let mut world = world(shares);
        let (maker, stranger) = (asker(&mut world, "u1", "t1", HOUR_US), asker(&mut world, "u2", "t2", HOUR_US));
        let place = made(&mut world, maker, 2, None, None);
        let clients = [0, 1].map(|core| watches(&mut world, Kind::Single, core, place));
        world.idle(SECOND_US);
        world.ask_for_session(stranger, place, true);
        world.idle(SECOND_US);
        assert_eq!(closed(&world, &clients), [None; 2], "nobody else ends it");
        world.ask_for_session(maker, place, false);
        world.ask_for_session(maker, place, true);
        world.idle(SECOND_US);
        assert_eq!(closed(&world, &clients), [Some(4004); 2]);
        assert_eq!((times(&world, "session told 200"), times(&world, "session told 204")), (1, 1));
        assert!(!opens(&mut world, place));
        world.leave();
    }
}

#[test]
fn nobody_has_more_sessions_than_they_may_and_what_is_over_makes_room() {
    for shares in [false, true] {
        let mut world = world(shares);
        let (one, other) = (asker(&mut world, "u1", "t1", HOUR_US), asker(&mut world, "u2", "t2", HOUR_US));
        for target in 0..SESSIONS_EACH {
            made(&mut world, one, target, None, Some(20));
        }
        made(&mut world, one, 0, None, None);
        assert_eq!(times(&world, "answer 429 TOO_MANY_STREAMS"), 1);
        made(&mut world, other, 0, None, None);
        world.ask_for_session(one, 0, true);
        world.idle(SECOND_US);
        made(&mut world, one, PLAIN, None, Some(20));
        assert_eq!((times(&world, "session 201"), times(&world, "session told 204")), (SESSIONS_EACH as u64 + 2, 1));
        world.idle(21 * SECOND_US);
        for target in 0..SESSIONS_EACH {
            made(&mut world, one, target, None, None);
        }
        assert_eq!(times(&world, "answer 429 TOO_MANY_STREAMS"), 1, "all of them have ended");
        world.leave();
    }
}

#[test]
fn a_drain_sends_away_who_watches_what_was_described() {
    for shares in [false, true] {
        let mut world = world(shares);
        let asker = asker(&mut world, "u1", "t1", HOUR_US);
        let place = made(&mut world, asker, 7, None, None);
        let login = login(&world, "u1", "t3", HOUR_US);
        let own = world.open_described(Kind::Events, 1, login, 9, held(Some(1)), 0).expect("there is room");
        let clients = [own, watches(&mut world, Kind::Single, 0, place), watches(&mut world, Kind::Events, 1, place)];
        world.idle(SECOND_US);
        world.drain();
        assert_eq!(closed(&world, &clients), [Some(1012); 3]);
    }
}

#[test]
fn a_reload_that_takes_a_target_off_the_list_ends_its_streams_and_moves_the_others() {
    for shares in [false, true] {
        let mut world = world(shares);
        let asker = asker(&mut world, "u1", "t1", HOUR_US);
        // The third target is the one that is taken off.
        let places = [3, 5].map(|target| made(&mut world, asker, target, None, None));
        let mut clients = Vec::new();
        for (target, place) in [3, 5].into_iter().zip(places) {
            let login = login(&world, "u2", "t2", HOUR_US);
            let own = world.open_described(Kind::Single, 1, login, target, held(None), 0).expect("there is room");
            clients.extend([own, watches(&mut world, Kind::Events, 0, place)]);
        }
        world.idle(2 * SECOND_US);
        let epoch = |world: &World, client: usize| world.clients[client].held[&name_of(5)].epoch.clone();
        let before = epoch(&world, clients[2]);
        world.publish_reload(2);
        world.idle(3 * SECOND_US);
        let [gone, kept] = [&clients[..2], &clients[2..]].map(|some| closed(&world, some));
        assert!(gone.iter().all(|code| matches!(code, Some(4003))), "{gone:?}");
        assert_eq!(kept, [None; 2]);
        assert_ne!(epoch(&world, clients[2]), before);
        assert_eq!(epoch(&world, clients[3]), epoch(&world, clients[2]), "they share a stream still");
        change(&mut world);
        assert!(!opens(&mut world, places[0]) && opens(&mut world, places[1]));
        world.rest();
        world.leave();
    }
}

#[test]
fn a_session_whose_time_the_clock_was_set_over_is_over() {
    for shares in [false, true] {
        let mut world = world(shares);
        let asker = asker(&mut world, "u1", "t1", HOUR_US);
        let place = made(&mut world, asker, 6, None, Some(20));
        let clients = [0, 1].map(|core| watches(&mut world, Kind::Single, core, place));
        world.idle(SECOND_US);
        world.book.wall_us += 25 * SECOND_US;
        world.book.store.was_set = true;
        world.clock_moved();
        world.idle(SECOND_US);
        assert_eq!(closed(&world, &clients), [Some(4004); 2]);
        assert!(!opens(&mut world, place));
        world.leave();
    }
}
