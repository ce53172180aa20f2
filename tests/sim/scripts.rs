//! Worlds that follow a script: one for each fault that was found, and for what chance meets too seldom.

use super::client::{Carrier, Held, Kind, Login};
use super::dice::Dice;
use super::law::{ACTION_PERMISSION, Rights, Token, User, What};
use super::store::{GRACE_S, REREAD_S};
use super::upstream::Mood;
use super::world::{Setup, World};

const HOUR_US: u64 = 3_600_000_000;
const SECOND_US: u64 = 1_000_000;

fn held(format: &str) -> Held {
    Held { format: format.to_owned(), state: "live".to_owned(), ..Held::default() }
}

fn world(setup: Setup) -> World {
    let mut world = World::with(Dice::seeded(1), setup);
    world.book.upstream.mood = Mood::Calm;
    world.book.store.is_reliable = true;
    world.fetch_us_max = 1;
    world
}

fn watch(world: &mut World, kind: Kind, life_us: u64, rate_ms: u64) -> usize {
    world.open(kind, 0, 0, life_us, "slow", held("patch"), rate_ms).expect("there is room")
}

/// Every value one version further, polled and delivered.
fn change(world: &mut World) {
    let mut dice = Dice::seeded(3);
    world.book.upstream.renew_all(&mut dice);
    world.idle(2 * SECOND_US);
}

#[test]
fn a_rated_reader_does_not_take_anothers_patches_away() {
    let mut world = world(Setup::plain());
    let plain = watch(&mut world, Kind::Single, HOUR_US, 0);
    watch(&mut world, Kind::Single, HOUR_US, 10);
    world.idle(SECOND_US);
    for _ in 0..5 {
        change(&mut world);
    }
    assert_eq!(world.conflations(), 0, "nobody is slow, so nobody is conflated");
    assert_eq!(world.clients[plain].held["slow"].seq, 6);
    world.rest();
}

#[test]
fn whoever_joins_during_a_pass_makes_nobody_miss_it() {
    let mut world = world(Setup { clients: 2_000, ..Setup::plain() });
    for _ in 0..1_000 {
        watch(&mut world, Kind::Single, HOUR_US, 0);
    }
    world.idle(SECOND_US);
    for round in 0..4 {
        let mut dice = Dice::seeded(round);
        world.book.upstream.renew_all(&mut dice);
        // The pass over 1,000 readers takes several turns, and in each somebody joins.
        let polls = world.fetches;
        while world.fetches < polls + 2 {
            world.pass_time(SECOND_US);
            for _ in 0..12 {
                watch(&mut world, Kind::Single, HOUR_US, 0);
                world.turn(0);
            }
        }
        world.idle(SECOND_US);
        assert_eq!(world.conflations(), 0, "nobody is slow, so nobody is conflated");
        let newest = world.book.upstream.newest("http://up/slow");
        for client in &world.clients {
            let version = super::upstream::version(client.held["slow"].value.as_deref().expect("a value"));
            assert_eq!(version, newest, "client {} holds the newest", client.number);
        }
    }
}

#[test]
fn nothing_is_sent_after_a_step_of_the_clock_before_everybody_was_looked_at() {
    let mut world = world(Setup { clients: 2_000, interval_ms: 1, ..Setup::plain() });
    for number in 0..1_000 {
        // The last are those that the first turns do not come to.
        let life_us = if number < 700 { HOUR_US } else { 60 * SECOND_US };
        watch(&mut world, Kind::Single, life_us, 0);
    }
    world.idle(SECOND_US);
    for round in 0..20 {
        let mut dice = Dice::seeded(round);
        world.book.upstream.renew_all(&mut dice);
        world.pass_time(SECOND_US);
        if round == 10 {
            world.book.wall_us += 120 * SECOND_US;
            world.clock_moved();
        }
        world.turn(0);
    }
    world.idle(3 * SECOND_US);
    let gone = world.clients.iter().filter(|client| client.closed == Some(4001)).count();
    assert_eq!(gone, 300, "exactly those whose tokens have ended are told so");
}

#[test]
fn an_ending_connection_that_takes_nothing_does_not_keep_the_core_busy() {
    let mut world = world(Setup { write_stall_s: 2, ..Setup::plain() });
    let stuck = watch(&mut world, Kind::Single, HOUR_US, 0);
    world.idle(SECOND_US);
    world.set_room(stuck, 0);
    // `settle` fails where time does not go on by itself.
    for _ in 0..4 {
        change(&mut world);
    }
    assert!(world.clients[stuck].gone, "it was reset after its grace");
}

#[test]
fn a_reader_that_is_always_a_little_behind_is_not_taken_for_dead() {
    let server = "heartbeat = \"2s\"".to_owned();
    let mut world = world(Setup { server, ..Setup::plain() });
    let slow = watch(&mut world, Kind::Single, HOUR_US, 0);
    world.idle(SECOND_US);
    for _ in 0..40 {
        // It takes 60 bytes a step, never all there is.
        world.set_room(slow, 60);
        let mut dice = Dice::seeded(5);
        world.book.upstream.renew_all(&mut dice);
        world.idle(SECOND_US / 2);
        assert_eq!(world.clients[slow].closed, None, "it reads, and answers what it has read");
    }
}

#[test]
fn an_answer_to_a_stream_that_is_gone_is_not_taken_for_anothers() {
    let limits = "streams = 1".to_owned();
    let mut world = world(Setup { limits, linger_ms: 0, evicts: true, ..Setup::plain() });
    world.fetch_us_max = 4 * SECOND_US;
    // Each stream is given up while its first poll is under way, and its place goes to the next.
    for name in ["fast", "slow", "keyed", "own"].repeat(10) {
        let client = world.open(Kind::Single, 0, 0, HOUR_US, name, held("full"), 0).expect("there is room");
        world.idle(SECOND_US / 10);
        world.end(client, false);
        world.idle(SECOND_US / 100);
    }
    // A value of another stream would have failed the client that got it; now the last one gets its own.
    let last = world.open(Kind::Single, 0, 0, HOUR_US, "par?region=eu", held("full"), 0).expect("there is room");
    world.idle(10 * SECOND_US);
    assert!(world.clients[last].held["par?region=eu"].value.is_some());
}

#[test]
fn watchers_that_come_and_go_leave_no_timers_behind() {
    let mut world = world(Setup { linger_ms: 600_000, ..Setup::plain() });
    let many = world.open(Kind::Many, 0, 0, 10 * HOUR_US, "", Held::default(), 0).expect("there is room");
    world.idle(SECOND_US);
    for _ in 0..300 {
        world.subscribe(many, "slow", held("patch"), 3_600_000);
        world.idle(20_000);
    }
    let stats = world.cores[0].shard.stats();
    assert!(stats.timers <= 8, "{stats:?}");
}

#[test]
fn what_changes_together_on_several_streams_is_one_send_to_whoever_reads_them_all() {
    let mut world = world(Setup { clients: 2_000, interval_ms: 1, ..Setup::plain() });
    let streams = ["fast", "slow", "keyed", "own"];
    for _ in 0..1_000 {
        world.open(Kind::Many, 0, 0, HOUR_US, "", Held::default(), 0).expect("there is room");
    }
    world.idle(SECOND_US);
    for name in streams {
        for number in 0..1_000 {
            world.subscribe(number, name, held("patch"), 0);
        }
        world.idle(SECOND_US);
    }
    let before = world.sends;
    let mut dice = Dice::seeded(5);
    world.book.upstream.renew_all(&mut dice);
    // All are due by then, are polled in one turn and answered in one turn.
    world.move_clocks(50_000);
    for _ in 0..2 {
        world.turn(0);
    }
    world.idle(SECOND_US);
    let sends = world.sends - before;
    // Four each without it. Some sends are short, and one stream may be a turn behind the others.
    assert!((1_000..2_000).contains(&sends), "{sends} sends for 4 frames to each of 1,000");
    assert_eq!(world.conflations(), 0, "nobody is slow, so nobody is conflated");
    for client in &world.clients {
        for name in streams {
            let newest =
                world.book.upstream.newest(&format!("http://up/{}", if name == "own" { "own/0" } else { name }));
            let version = super::upstream::version(client.held[name].value.as_deref().expect("a value"));
            assert_eq!(version, newest, "client {} holds the newest of {name}", client.number);
        }
    }
}

#[test]
fn an_event_that_is_lost_between_cores_is_made_up_for_although_no_other_comes() {
    let mut world = world(Setup { cores: 2, ..Setup::plain() });
    let watchers = [0, 1].map(|core| {
        let [whole, items] = [None, Some(3)].map(|choice| selects(&mut world, Kind::Single, core, "slow", choice));
        let many = selects(&mut world, Kind::Events, core, "slow", None);
        [whole, items, many]
    });
    world.idle(3 * SECOND_US);
    for round in 0..5 {
        world.loses_events = true;
        let mut dice = Dice::seeded(round);
        world.book.upstream.renew_all(&mut dice);
        let polls = world.fetches;
        while world.fetches < polls + 2 {
            world.idle(SECOND_US / 100);
        }
        world.loses_events = false;
        world.idle(2 * SECOND_US);
        for client in watchers.as_flattened() {
            let held = &world.clients[*client].held["slow"];
            let value = held.value.as_deref().expect("a value");
            let newest = match held.choice {
                None => world.book.upstream.is_newest("http://up/slow", value),
                Some(choice) => world.book.upstream.is_newest_choice("http://up/slow", choice, value),
            };
            assert!(newest, "client {client} holds the newest in round {round}");
        }
    }
    world.rest();
    world.leave();
}

// What clients select, and what the administrator does to streams.

/// Somebody on that stream, of which they select so.
fn selects(world: &mut World, kind: Kind, core: usize, name: &str, choice: Option<usize>) -> usize {
    let held = Held { choice, ..held("patch") };
    world.open(kind, core, 0, HOUR_US, name, held, 0).expect("there is room")
}

fn place(world: &World, client: usize, name: &str) -> (String, u64) {
    let held = &world.clients[client].held[name];
    (held.epoch.clone(), held.seq)
}

#[test]
fn whoever_selects_the_same_shares_a_sequence_and_what_is_not_selected_moves_nobody() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    let kinds = [Kind::Single, Kind::Events];
    // Some of each choice, on both cores; the same dice spell one path in both ways.
    let mut chosen = Vec::new();
    for n in 0..24 {
        let choice = n / 4;
        chosen.push((choice, selects(&mut world, kinds[n % 2], n / 2 % 2, "slow", Some(choice))));
    }
    let whole = selects(&mut world, Kind::Single, 0, "slow", None);
    world.idle(3 * SECOND_US);
    let before: Vec<(String, u64)> = chosen.iter().map(|(_, client)| place(&world, *client, "slow")).collect();
    let mut epochs: Vec<&str> = before.iter().map(|(epoch, _)| &**epoch).collect();
    for (same, four) in chosen.chunks(4).zip(before.chunks(4)) {
        assert!(four.iter().all(|one| *one == four[0]), "choice {} is one sequence: {four:?}", same[0].0);
    }
    epochs.sort_unstable();
    epochs.dedup();
    assert_eq!(epochs.len(), 6, "each choice is a sequence of its own");
    let whole_before = place(&world, whole, "slow");
    for _ in 0..3 {
        world.book.upstream.renew_hidden("http://up/slow");
        world.idle(2 * SECOND_US);
    }
    assert_eq!(place(&world, whole, "slow"), (whole_before.0, whole_before.1 + 3));
    for ((choice, client), before) in chosen.iter().zip(&before) {
        // The version alone is another.
        let moved = if *choice == 2 { 3 } else { 0 };
        assert_eq!(place(&world, *client, "slow"), (before.0.clone(), before.1 + moved), "choice {choice}");
    }
    world.rest();
    world.leave();
}

#[test]
fn a_changed_stream_goes_on_in_another_epoch_and_a_deleted_one_ends_for_whoever_watches() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    world.put_stream("made", true);
    world.hear_all();
    let mut watchers = Vec::new();
    for core in 0..2 {
        for choice in [None, Some(1)] {
            watchers.push(selects(&mut world, Kind::Single, core, "made", choice));
            watchers.push(selects(&mut world, Kind::Events, core, "made", choice));
        }
    }
    let many = selects(&mut world, Kind::Many, 1, "", None);
    world.idle(SECOND_US);
    world.subscribe(many, "made", Held { choice: Some(1), ..held("full") }, 0);
    world.subscribe(many, "slow", held("patch"), 0);
    let asker = comes(&mut world, Kind::Json, 0, "u1", "t1", "");
    world.idle(2 * SECOND_US);
    for moves in [true, false] {
        let before: Vec<String> = watchers.iter().map(|client| place(&world, *client, "made").0).collect();
        world.put_stream("made", moves);
        // The cores hear of it one after the other; an old epoch after the new one fails the client that gets it.
        world.idle(3 * SECOND_US);
        for (client, before) in watchers.iter().zip(before) {
            let (epoch, seq) = place(&world, *client, "made");
            assert!(epoch != before && seq == 1, "client {client} holds {epoch}-{seq}, {before} before");
        }
        assert_eq!(place(&world, many, "made"), place(&world, watchers[2], "made"));
        assert_eq!(closed(&world, &watchers), [None; 8], "nobody was dropped");
    }
    world.ask_for_choice(asker, "made", Some(0), None, None);
    world.idle(SECOND_US);
    let known = world.clients[asker].etag.clone();
    world.ask_for_choice(asker, "made", Some(0), known, Some(60));
    world.idle(SECOND_US);
    world.delete_stream("made");
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &watchers), [Some(4004); 8]);
    assert_eq!(world.clients[many].closed, None);
    assert_eq!(world.clients[many].held.keys().collect::<Vec<_>>(), ["slow"]);
    assert_eq!(world.book.tally["unsubscribed stream_ended"], 1);
    assert_eq!(world.book.tally.get("answer 404 STREAM_ENDED"), Some(&1), "{:?}", world.book.tally);
    let later = selects(&mut world, Kind::Single, 0, "made", None);
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[later]), [Some(404)]);
    world.rest();
    world.leave();
}

#[test]
fn a_stopped_stream_is_not_polled_and_its_watchers_know_until_it_is_started() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    world.put_stream("made", true);
    world.hear_all();
    let kinds = [Kind::Single, Kind::Events];
    let watchers: Vec<usize> = (0..4).map(|n| selects(&mut world, kinds[n % 2], n / 2, "made", None)).collect();
    world.idle(2 * SECOND_US);
    let before = place(&world, watchers[0], "made");
    let states = |world: &World| -> Vec<String> {
        watchers.iter().map(|client| world.clients[*client].held["made"].state.clone()).collect()
    };
    world.stop_stream("made");
    world.idle(SECOND_US / 4);
    assert_eq!(states(&world), ["stale"; 4]);
    let polls = world.fetches;
    change(&mut world);
    world.idle(20 * SECOND_US);
    assert_eq!(world.fetches, polls, "nobody polls it");
    let joins = selects(&mut world, Kind::Single, 1, "made", None);
    world.idle(SECOND_US);
    assert_eq!((place(&world, joins, "made"), &*world.clients[joins].held["made"].state), (before.clone(), "stale"));
    world.start_stream("made");
    world.idle(2 * SECOND_US);
    assert_eq!(states(&world), ["live"; 4]);
    assert_eq!(place(&world, watchers[0], "made"), (before.0, before.1 + 1), "it goes on where it was");
    world.rest();
    world.leave();
}

// What is said from outside.

fn logged_out(sub: &str) -> What {
    What::LoggedOut(User { issuer: None, sub: sub.to_owned() })
}

fn rights_of(sub: &str, rights: &Rights) -> What {
    let user = User { issuer: None, sub: sub.to_owned() };
    What::Rights { user, roles: Some(rights.roles.clone()), permissions: Some(rights.permissions.clone()) }
}

fn reader() -> Rights {
    Rights::of(&["agent"], &["read", "list"])
}

/// A token of an hour, with rights and a name.
fn token(world: &World, jti: &str) -> Token {
    Token { rights: reader(), jti: Some(jti.to_owned()), ..world.plain_token(0, HOUR_US) }
}

fn login(issuer: Option<&'static str>, sub: &str, token: Token, carrier: Carrier) -> Login {
    Login { issuer, sub: sub.to_owned(), token, carrier }
}

/// Somebody with a token of that name, on a core.
fn comes(world: &mut World, kind: Kind, core: usize, sub: &str, jti: &str, name: &str) -> usize {
    let login = login(None, sub, token(world, jti), Carrier::Header);
    world.open_as(kind, core, login, name, held("patch"), 0).expect("there is room")
}

/// Somebody with a session, on a core.
fn comes_by_session(world: &mut World, kind: Kind, core: usize, sub: &str, sid: &str, name: &str) -> usize {
    let login = login(None, sub, world.session_token(sid), Carrier::Session);
    world.open_as(kind, core, login, name, held("patch"), 0).expect("there is room")
}

fn signs_in(world: &mut World, sub: &str) -> String {
    world.sign_in(sub, reader(), 0, HOUR_US, false)
}

fn closed(world: &World, numbers: &[usize]) -> Vec<Option<u16>> {
    numbers.iter().map(|&number| world.clients[number].closed).collect()
}

#[test]
fn what_agents_do_not_see_moves_nothing_of_theirs_and_a_new_role_moves_them() {
    let mut world = world(Setup { cores: 2, ..Setup::plain() });
    let of_role = |world: &World, role: &str| Token { rights: Rights::of(&[role], &[]), ..token(world, "t1") };
    let mut of = |kind, role| {
        let login = login(None, "u1", of_role(&world, role), Carrier::Header);
        world.open_as(kind, 0, login, "roled", held("patch"), 0).expect("there is room")
    };
    let agents = [of(Kind::Single, "agent"), of(Kind::Events, "agent")];
    let admins = [of(Kind::Single, "admin"), of(Kind::Events, "admin")];
    world.idle(3 * SECOND_US);
    let places = |world: &World, clients: &[usize]| -> Vec<(String, u64)> {
        clients.iter().map(|&client| &world.clients[client].held["roled"]).map(|h| (h.epoch.clone(), h.seq)).collect()
    };
    let (before, admins_before) = (places(&world, &agents), places(&world, &admins));
    assert_eq!(before[0], before[1]);
    assert_ne!(before[0].0, admins_before[0].0, "each view has its own epoch");
    for _ in 0..5 {
        world.book.upstream.renew_hidden("http://up/roled");
        world.idle(2 * SECOND_US);
    }
    assert_eq!(places(&world, &agents), before, "nothing has changed for them");
    let moved: Vec<u64> = places(&world, &admins).iter().map(|(_, seq)| *seq).collect();
    assert_eq!(moved, [admins_before[0].1 + 5; 2]);
    let admin = of_role(&world, "admin");
    world.renew_with(agents[0], admin);
    world.idle(SECOND_US);
    assert_eq!(places(&world, &agents)[0], places(&world, &admins)[0], "an agent no more");
    // Their view is watched by one alone now, and goes on where it was.
    change(&mut world);
    assert_eq!(places(&world, &agents)[1], (before[1].0.clone(), before[1].1 + 1));
    world.rest();
}

#[test]
fn a_logout_ends_all_that_a_user_has_in_one_turn_and_nobody_else() {
    for many in [60, 6_000] {
        let mut world = world(Setup { clients: 10_000, cores: 2, interval_ms: 1, ..Setup::plain() });
        for number in 0..many {
            let kind = [Kind::Single, Kind::Events][number / 5 % 2];
            world.open(kind, number / 10 % 2, 0, HOUR_US, "slow", held("patch"), 0).expect("there is room");
        }
        world.idle(SECOND_US);
        for round in 0..4 {
            let mut dice = Dice::seeded(round);
            world.book.upstream.renew_all(&mut dice);
            world.pass_time(SECOND_US);
            if round == 2 {
                // A frame that is started from now on fails the client that gets it.
                world.decree_at_once(logged_out("u3"));
            }
            world.turn(0);
            world.turn(1);
        }
        world.idle(2 * SECOND_US);
        for client in &world.clients {
            let expected = (client.sub == "u3").then_some(4010);
            assert_eq!(client.closed, expected, "client {} of {}", client.number, client.sub);
        }
    }
}

#[test]
fn logouts_that_follow_closely_are_carried_out_together_and_leave_time_for_deliveries() {
    let mut world = world(Setup { clients: 10_000, interval_ms: 1, ..Setup::plain() });
    for number in 0..5_000 {
        comes(&mut world, Kind::Single, 0, "u1", &format!("t{number}"), "slow");
    }
    world.idle(SECOND_US);
    let left = |world: &World| world.clients.iter().filter(|client| client.closed.is_none()).count();
    assert_eq!(left(&world), 5_000);
    let revoked = |jti: &str| What::Revoked { issuer: None, jti: jti.to_owned(), exp_s: None };
    world.decree_at_once(revoked("t10"));
    for _ in 0..16 {
        world.turn(0);
    }
    assert_eq!(left(&world), 4_999);
    // The second and third come while the first pass is not long ago: they wait for the next, and nobody for them longer.
    world.decree_at_once(revoked("t20"));
    world.decree_at_once(revoked("t30"));
    world.turn(0);
    assert_eq!(left(&world), 4_999, "they wait");
    world.idle(30_000);
    assert_eq!(left(&world), 4_997, "not for long");
}

#[test]
fn a_logout_ends_every_transport_and_its_tokens_come_back_by_no_way() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    let kinds = [Kind::Single, Kind::Many, Kind::Events];
    let ended: Vec<usize> = (0..6).map(|n| comes(&mut world, kinds[n % 3], n % 2, "u1", "t1", "slow")).collect();
    let poll = comes(&mut world, Kind::Json, 1, "u1", "t1", "");
    let asker = comes(&mut world, Kind::Json, 0, "u1", "t1", "");
    let other = comes(&mut world, Kind::Single, 1, "u2", "t2", "slow");
    world.idle(SECOND_US);
    world.ask_for_value(poll, "slow", None, None);
    world.ask_for_ticket(asker);
    world.idle(SECOND_US);
    let known = world.clients[poll].etag.clone();
    world.ask_for_value(poll, "slow", known, Some(60));
    // Time must go on, for a token of the same second is logged out with the earlier ones.
    world.idle(2 * SECOND_US);
    world.decree_at_once(logged_out("u1"));
    world.idle(SECOND_US / 4);
    assert_eq!(closed(&world, &ended), [Some(4010); 6]);
    assert!(world.clients[poll].requests.is_empty(), "the waiting poll has its answer");
    assert_eq!(world.book.tally["answer 401 LOGGED_OUT"], 1);
    assert_eq!(closed(&world, &[other]), [None]);

    world.idle(SECOND_US);
    // By a handshake, a request, a ticket, a first message, a renewal: each fails the model where it is let in.
    let old = Token { iat_s: Some(world.book.wall_us / SECOND_US - 1), ..token(&world, "t9") };
    let mut again = Vec::new();
    for carrier in [Carrier::Header, Carrier::Query, Carrier::Cookie, Carrier::FirstMessage, Carrier::Ticket(0)] {
        let login = match carrier {
            Carrier::Ticket(place) => world.ticket_login(place),
            _ => login(None, "u1", Token { sent_after: world.book.law.said.len(), ..old.clone() }, carrier),
        };
        again.extend(world.open_as(Kind::Single, 1, login, "slow", held("patch"), 0));
    }
    world.ask_for_value(asker, "slow", None, None);
    let fresh = comes(&mut world, Kind::Events, 0, "u1", "t3", "slow");
    let many = comes(&mut world, Kind::Many, 0, "u1", "t3", "");
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[fresh, many]), [None, None], "a later token is good");
    let refused = closed(&world, &again);
    assert_eq!(refused, [Some(401), Some(401), Some(401), Some(4010), Some(401)]);
    world.renew_with(many, Token { sent_after: 1, ..old.clone() });
    world.renew_over(fresh, asker, Token { sent_after: 1, ..old });
    world.idle(SECOND_US);
    assert_eq!((world.clients[many].renewals_refused, world.clients[fresh].tokens.len()), (1, 1));
    world.rest();
}

#[test]
fn a_mark_stands_before_any_core_has_heard_of_it() {
    let mut world = world(Setup { cores: 2, ..Setup::plain() });
    world.idle(2 * SECOND_US);
    let old = token(&world, "t1");
    world.idle(2 * SECOND_US);
    world.decree_that(logged_out("u1"));
    assert!(world.book.law.said[0].heard.iter().all(Option::is_none));
    let again: Vec<usize> = (0..2)
        .filter_map(|core| {
            let login = login(None, "u1", Token { sent_after: 1, ..old.clone() }, Carrier::Header);
            world.open_as(Kind::Single, core, login, "slow", held("patch"), 0)
        })
        .collect();
    for core in 0..2 {
        world.turn(core);
    }
    assert_eq!(closed(&world, &again), [Some(401), Some(401)]);
}

#[test]
fn what_is_said_of_one_issuers_user_is_said_of_nobody_elses() {
    let mut world = world(Setup { clients: 40, ..Setup::plain() });
    let (a, b) = (Some("https://a.example"), Some("https://b.example"));
    let of = |world: &mut World, issuer, sub: &str, jti: &str| {
        let login = login(issuer, sub, token(world, jti), Carrier::Header);
        world.open_as(Kind::Single, 0, login, "slow", held("patch"), 0).expect("there is room")
    };
    let all: Vec<usize> = [a, b, None].into_iter().map(|issuer| of(&mut world, issuer, "u1", "t1")).collect();
    world.idle(2 * SECOND_US);
    world.decree_at_once(What::Revoked { issuer: b, jti: "t1".to_owned(), exp_s: None });
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &all), [None, Some(4010), None]);
    world.decree_at_once(What::LoggedOut(User { issuer: a, sub: "u1".to_owned() }));
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &all), [Some(4010), Some(4010), None]);
    let later: Vec<usize> = [a, b, None].into_iter().map(|issuer| of(&mut world, issuer, "u1", "t2")).collect();
    world.idle(2 * SECOND_US);
    let user = User { issuer: None, sub: "u1".to_owned() };
    let before_s = world.book.wall_us / SECOND_US;
    world.decree_at_once(What::IssuedBefore { user, before_s });
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &later), [Some(4010); 3]);
    assert_eq!(world.book.tally["close 4010 token_revoked"], 5);
    assert_eq!(world.book.tally["close 4010 logged_out"], 1);
}

#[test]
fn a_reader_that_takes_nothing_is_reset_in_time_when_its_user_logs_out() {
    let mut world = world(Setup::plain());
    let stuck = comes(&mut world, Kind::Single, 0, "u1", "t1", "slow");
    world.idle(2 * SECOND_US);
    world.set_room(stuck, 0);
    change(&mut world);
    world.decree_at_once(logged_out("u1"));
    world.idle(SECOND_US + SECOND_US / 4);
    assert!(world.clients[stuck].gone);
}

#[test]
fn permissions_that_change_take_a_stream_away_and_let_it_be_had_again() {
    let mut world = world(Setup { clients: 40, ..Setup::plain() });
    let single = comes(&mut world, Kind::Single, 0, "u1", "t1", "vault");
    let events = comes(&mut world, Kind::Events, 0, "u1", "t2", "vault");
    let many = comes(&mut world, Kind::Many, 0, "u1", "t3", "");
    let only = comes(&mut world, Kind::Many, 0, "u1", "t4", "");
    let poll = comes(&mut world, Kind::Json, 0, "u1", "t5", "");
    world.idle(SECOND_US);
    for name in ["team", "vault", "slow"] {
        world.subscribe(many, name, held("patch"), 0);
    }
    world.subscribe(only, "vault", held("patch"), 0);
    world.ask_for_value(poll, "vault", None, None);
    world.idle(SECOND_US);
    let known = world.clients[poll].etag.clone();
    world.ask_for_value(poll, "vault", known, Some(60));
    world.idle(SECOND_US);
    world.decree_at_once(rights_of("u1", &Rights::of(&["agent"], &["read"])));
    change(&mut world);
    assert_eq!(closed(&world, &[single, events, only]), [Some(4003); 3], "none is left");
    assert_eq!(world.clients[many].held.keys().collect::<Vec<_>>(), ["slow", "team"]);
    assert!(world.clients[poll].requests.is_empty(), "whoever waited is told so");
    assert_eq!(world.book.tally["answer 403 INSUFFICIENT_PERMISSIONS"], 1);
    assert_eq!(world.book.tally["permission_update "], 4);
    // What comes next is judged by them, whoever asks.
    world.subscribe(many, "vault", held("patch"), 0);
    let fresh = comes(&mut world, Kind::Single, 0, "u1", "t6", "vault");
    world.idle(SECOND_US);
    assert_eq!(world.book.tally["error INSUFFICIENT_PERMISSIONS"], 1);
    assert_eq!(closed(&world, &[fresh]), [None], "a later token has its own rights");
    world.decree_at_once(rights_of("u1", &reader()));
    world.subscribe(many, "vault", held("patch"), 0);
    change(&mut world);
    assert_eq!(world.clients[many].held.len(), 3);
    world.rest();
}

#[test]
fn a_session_lives_as_long_as_its_record_says() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    let short = world.sign_in("u1", reader(), 0, 10 * SECOND_US, true);
    let extended = world.sign_in("u1", reader(), 0, 10 * SECOND_US, true);
    let deleted = signs_in(&mut world, "u1");
    let others = signs_in(&mut world, "u2");
    let nobodys = signs_in(&mut world, "u2");
    let all: Vec<usize> = [(&short, "u1"), (&extended, "u1"), (&deleted, "u1"), (&others, "u2"), (&nobodys, "u2")]
        .into_iter()
        .enumerate()
        .map(|(n, (sid, sub))| {
            let kind = [Kind::Single, Kind::Events][n % 2];
            comes_by_session(&mut world, kind, n % 2, sub, sid, "slow")
        })
        .collect();
    world.idle(SECOND_US);
    let now_us = world.book.mono_us;
    let expires_us = Some(world.book.wall_us + HOUR_US);
    world.book.store.extend(&extended, now_us, HOUR_US, expires_us);
    world.book.store.delete(&deleted, now_us);
    world.book.store.change(&others, now_us, |version| version.user = Some("u3".to_owned()));
    world.book.store.change(&nobodys, now_us, |version| version.user = None);
    world.idle(2 * REREAD_S * SECOND_US);
    assert_eq!(closed(&world, &all), [None, None, Some(4001), Some(4001), Some(4001)]);
    // To the end, and no later: the model counts.
    world.idle(9 * SECOND_US - 2 * REREAD_S * SECOND_US + SECOND_US / 4);
    assert_eq!(closed(&world, &all[..2]), [Some(4001), None]);
    world.idle(20 * SECOND_US);
    assert_eq!(closed(&world, &all[..2]), [Some(4001), None]);
    assert_eq!(world.book.tally["close 4001 session_expired"], 4);
    let again = comes_by_session(&mut world, Kind::Single, 0, "u1", &deleted, "slow");
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[again]), [Some(401)]);
    world.rest();
}

#[test]
fn rights_that_change_in_a_sessions_record_are_told_and_hold() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    let sid = signs_in(&mut world, "u1");
    let many = comes_by_session(&mut world, Kind::Many, 0, "u1", &sid, "");
    let single = comes_by_session(&mut world, Kind::Single, 1, "u1", &sid, "vault");
    world.idle(SECOND_US);
    for name in ["vault", "own"] {
        world.subscribe(many, name, held("patch"), 0);
    }
    world.idle(SECOND_US);
    let now_us = world.book.mono_us;
    world.book.store.change(&sid, now_us, |version| {
        version.rights = Rights::default();
        version.company = 2;
    });
    // What is published of a session's user makes its record be read at once: the record wins.
    world.decree_at_once(rights_of("u1", &Rights::of(&["admin"], &[])));
    world.idle(3 * SECOND_US);
    assert_eq!(closed(&world, &[many, single]), [None, Some(4003)]);
    let own = world.clients[many].held["own"].value.as_deref().expect("a value");
    assert!(world.book.upstream.has_served("http://up/own/2", own), "it has moved to the other company's values");
    assert_eq!(world.clients[many].held.len(), 1);
    world.clients[many].ask("{\"type\":\"auth_update\"}", super::client::Asked::Reread);
    world.idle(SECOND_US);
    assert_eq!(world.book.tally["auth_ok "], 1);
    world.rest();
}

#[test]
fn sessions_outlast_a_store_that_is_away_for_their_grace_and_no_longer() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    let sid = signs_in(&mut world, "u1");
    let by_session = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    let by_token = comes(&mut world, Kind::Single, 1, "u1", "t1", "slow");
    world.idle(SECOND_US);
    let leaves = |world: &mut World| {
        world.store_leaves();
        world.store_returns_us = None;
    };
    leaves(&mut world);
    world.idle((GRACE_S - 5) * SECOND_US);
    let refused = comes_by_session(&mut world, Kind::Single, 1, "u1", &sid, "slow");
    world.idle(4 * SECOND_US);
    assert_eq!(closed(&world, &[by_session, by_token, refused]), [None, None, Some(503)]);
    world.store_returns();
    world.idle(2 * SECOND_US);
    leaves(&mut world);
    world.idle((GRACE_S - 1) * SECOND_US);
    assert_eq!(closed(&world, &[by_session, by_token]), [None, None], "its record was read again");
    world.idle(3 * SECOND_US);
    assert_eq!(closed(&world, &[by_session, by_token]), [Some(4001), None]);
    world.store_returns();
    world.idle(SECOND_US);
    let again = comes_by_session(&mut world, Kind::Single, 1, "u1", &sid, "slow");
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[again]), [None]);
    world.rest();
}

#[test]
fn a_sessions_logout_is_heard_by_who_is_about_to_be_let_in() {
    let mut world = world(Setup::plain());
    let sid = signs_in(&mut world, "u1");
    let inside = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.idle(3 * SECOND_US);
    let outside = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.turn(0);
    assert_eq!(world.cores[0].asking.len(), 1, "the store is asked");
    world.decree_at_once(What::SessionLoggedOut { sid: sid.clone() });
    world.idle(3 * SECOND_US);
    assert_eq!(closed(&world, &[inside, outside]), [Some(4010), Some(401)]);
    let later = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.idle(3 * SECOND_US);
    assert_eq!(closed(&world, &[later]), [Some(401)], "its record still stands, and does not count");
    assert_eq!(world.book.tally["answer 401 LOGGED_OUT"], 2);
}

#[test]
fn a_users_logout_ends_a_session_that_began_before_the_clock_was_set_back() {
    let mut world = world(Setup::plain());
    let sid = signs_in(&mut world, "u1");
    let single = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.idle(SECOND_US);
    world.book.wall_us -= 20 * SECOND_US;
    world.book.store.was_set = true;
    world.book.store.set_back_us += 20 * SECOND_US;
    world.clock_moved();
    world.idle(SECOND_US);
    world.decree_at_once(logged_out("u1"));
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[single]), [Some(4010)]);
    let later = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.idle(3 * SECOND_US);
    assert_eq!(closed(&world, &[later]), [None], "afterwards its record counts alone");
}

#[test]
fn a_logout_dated_between_two_steps_of_the_clock_ends_a_session_that_began_before_both() {
    let mut world = world(Setup::plain());
    let sid = signs_in(&mut world, "u1");
    let single = comes_by_session(&mut world, Kind::Single, 0, "u1", &sid, "slow");
    world.idle(SECOND_US);
    world.book.wall_us -= 20 * SECOND_US;
    world.book.store.was_set = true;
    world.book.store.set_back_us += 20 * SECOND_US;
    world.clock_moved();
    world.decree_that(logged_out("u1"));
    world.book.wall_us += 5 * SECOND_US;
    world.clock_moved();
    world.hear_all();
    world.idle(SECOND_US);
    assert_eq!(closed(&world, &[single]), [Some(4010)]);
}

#[test]
fn a_ticket_is_good_once_and_for_whoever_it_was_made() {
    let mut world = world(Setup { cores: 4, clients: 40, ..Setup::plain() });
    for away in [false, true] {
        if away {
            world.store_leaves();
            world.store_returns_us = None;
            world.idle(SECOND_US);
        }
        let asker = comes(&mut world, Kind::Json, 0, "u1", "t1", "");
        world.ask_for_ticket(asker);
        world.idle(3 * SECOND_US);
        let place = world.book.tickets.len() - 1;
        // Four cores get it at the same time.
        let users: Vec<usize> = (0..4)
            .filter_map(|core| {
                let login = world.ticket_login(place);
                world.open_as(Kind::Single, core, login, "slow", held("patch"), 0)
            })
            .collect();
        world.idle(3 * SECOND_US);
        let mut ends = closed(&world, &users);
        ends.sort_unstable();
        assert_eq!(ends[0], None, "{ends:?}");
        assert!(ends[1..].iter().all(|end| matches!(end, Some(401 | 503))), "{ends:?}");
        assert!(world.book.tickets[place].used_by.is_some());
    }
    // One that nobody uses is no good after its time.
    let asker = comes(&mut world, Kind::Json, 0, "u1", "t1", "");
    world.ask_for_ticket(asker);
    world.idle(33 * SECOND_US);
    let login = world.ticket_login(2);
    let late = world.open_as(Kind::Single, 1, login, "slow", held("patch"), 0).expect("there is room");
    world.idle(3 * SECOND_US);
    assert!(matches!(closed(&world, &[late])[0], Some(401 | 503)));
}

#[test]
fn a_renewal_that_waits_for_the_store_is_not_overtaken_after_another_was_refused() {
    let mut world = world(Setup::plain());
    let asker = comes(&mut world, Kind::Json, 0, "u1", "t1", "");
    let single = comes(&mut world, Kind::Single, 0, "u1", "t2", "slow");
    world.ask_for_ticket(asker);
    world.idle(3 * SECOND_US);
    world.renew_by_ticket(single, 0);
    for jti in ["t3", "t4"] {
        let token = token(&world, jti);
        world.renew_with(single, token);
    }
    world.turn(0);
    // A later token that was taken in meanwhile would be followed by the ticket's, which is an earlier one.
    world.idle(3 * SECOND_US);
    let client = &world.clients[single];
    assert_eq!((client.renewals_accepted, client.renewals_refused), (1, 0), "the ticket's alone, at last");
    assert_eq!(world.book.tally["error AUTH_UPDATE_REJECTED"], 2);
    assert_eq!(client.tokens[0].jti.as_deref(), Some("t1"));
}

/// One on `/v1/ws` who may act until its token ends in five seconds, and one who asks for values with a token of the same name.
fn actor_and_asker(world: &mut World) -> (usize, usize) {
    let rights = Rights::of(&[], &[ACTION_PERMISSION]);
    let short = Token { rights, jti: Some("t1".to_owned()), ..world.plain_token(0, 5 * SECOND_US) };
    let long = token(world, "t1");
    let logins = [(Kind::Many, short), (Kind::Json, long)];
    let [actor, asker] = logins.map(|(kind, token)| {
        let login = login(None, "u1", token, Carrier::Header);
        world.open_as(kind, 0, login, "slow", held("patch"), 0).expect("there is room")
    });
    world.idle(SECOND_US);
    world.ask_to_act(actor);
    world.idle(SECOND_US);
    assert_eq!(world.book.tally.get("action_result"), Some(&1));
    (actor, asker)
}

fn revoke(world: &mut World) {
    world.decree_at_once(What::Revoked { issuer: None, jti: "t1".to_owned(), exp_s: None });
}

#[test]
fn a_value_that_comes_with_a_revocation_is_not_given_to_whoever_waits_for_it() {
    let mut world = world(Setup::plain());
    let (_, asker) = actor_and_asker(&mut world);
    world.fetch_us_max = SECOND_US;
    // Nobody watches it: it is polled for who asks.
    world.ask_for_value(asker, "fast", None, None);
    world.settle();
    world.move_clocks(2 * SECOND_US);
    // The value is there, and the core hears before it takes it in.
    revoke(&mut world);
    world.settle();
    assert_eq!(world.book.tally.get("answer 401 TOKEN_REVOKED"), Some(&1));
    world.rest();
}

#[test]
fn whoever_is_revoked_acts_no_more() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    world.ask_to_act(actor);
    revoke(&mut world);
    world.idle(2 * SECOND_US);
    assert_eq!(world.clients[actor].closed, Some(4010));
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was not carried out");
}

#[test]
fn whoever_has_lost_the_right_acts_no_more() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    world.ask_to_act(actor);
    let user = User { issuer: None, sub: "u1".to_owned() };
    world.decree_at_once(What::Rights { user, roles: None, permissions: Some(Vec::new()) });
    world.idle(2 * SECOND_US);
    assert_eq!(world.clients[actor].closed, None);
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was not carried out");
}

/// It is said and its mark stands, and no core hears of it for a while.
fn unheard(world: &mut World, what: What) {
    world.decree_that(what);
    let due_us = world.book.mono_us + SECOND_US / 5;
    world.news.iter_mut().flatten().for_each(|(due, _)| *due = due_us);
}

fn revoked(jti: &str) -> What {
    What::Revoked { issuer: None, jti: jti.to_owned(), exp_s: None }
}

#[test]
fn whoever_is_revoked_acts_no_more_before_their_core_has_heard() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    unheard(&mut world, revoked("t1"));
    world.ask_to_act(actor);
    world.settle();
    assert_eq!(world.clients[actor].closed, Some(4010), "what it asks is judged by what stands");
    world.idle(2 * SECOND_US);
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was not carried out");
}

#[test]
fn whoever_has_lost_the_right_acts_no_more_before_their_core_has_heard() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    let user = User { issuer: None, sub: "u1".to_owned() };
    unheard(&mut world, What::Rights { user, roles: None, permissions: Some(Vec::new()) });
    world.ask_to_act(actor);
    world.idle(2 * SECOND_US);
    assert_eq!(world.clients[actor].closed, None);
    assert_eq!(world.book.tally.get("error INSUFFICIENT_PERMISSIONS"), Some(&1));
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was not carried out");
}

#[test]
fn whoever_is_revoked_while_they_act_is_not_told_of_it_before_their_core_has_heard() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    world.ask_to_act(actor);
    world.settle();
    world.end_acts_at_once();
    unheard(&mut world, revoked("t1"));
    world.settle();
    assert_eq!(world.clients[actor].closed, Some(4010));
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was carried out, and nobody was told");
}

#[test]
fn a_logout_ends_an_event_stream_that_is_renewed_before_its_core_has_heard() {
    let mut world = world(Setup { cores: 2, clients: 40, ..Setup::plain() });
    for core in [0, 1] {
        let events = comes(&mut world, Kind::Events, core, "u1", "t1", "slow");
        let over = comes(&mut world, Kind::Json, 0, "u2", "t2", "");
        world.idle(2 * SECOND_US);
        unheard(&mut world, logged_out("u1"));
        // A token that the logout does not concern: it is of a later second.
        let late = Token { iat_s: Some(world.book.wall_us / SECOND_US + 2), ..token(&world, "t3") };
        world.renew_over(events, over, late);
        world.idle(3 * SECOND_US);
        assert_eq!(closed(&world, &[events]), [Some(4010)], "what was there when it was said has ended");
    }
}

#[test]
fn a_value_that_comes_before_its_core_has_heard_of_a_revocation_is_not_given() {
    let mut world = world(Setup::plain());
    let (_, asker) = actor_and_asker(&mut world);
    world.fetch_us_max = SECOND_US;
    world.ask_for_value(asker, "fast", None, None);
    world.settle();
    unheard(&mut world, revoked("t1"));
    // The value comes first.
    world.end_fetches_at_once();
    world.settle();
    assert_eq!(world.book.tally.get("answer 401 TOKEN_REVOKED"), Some(&1));
    assert!(world.clients[asker].requests.is_empty());
    world.rest();
}

#[test]
fn nobody_acts_under_a_token_that_has_ended_before_its_turn() {
    let mut world = world(Setup::plain());
    let (actor, _) = actor_and_asker(&mut world);
    world.ask_to_act(actor);
    world.move_clocks(4 * SECOND_US);
    world.idle(2 * SECOND_US);
    assert_eq!(world.clients[actor].closed, Some(4001));
    assert_eq!(world.book.tally.get("action_result"), Some(&1), "the second was not carried out");
}

#[test]
fn a_session_that_cannot_be_touched_ends_with_its_key() {
    for (loses_touches, closed) in [(0, None), (100, Some(4001))] {
        let mut world = world(Setup { touches: true, loses_touches, ..Setup::plain() });
        let sid = world.sign_in("u1", reader(), 0, 20 * SECOND_US, true);
        let token = world.session_token(&sid);
        let login = login(None, "u1", token, Carrier::Session);
        let number = world.open_as(Kind::Many, 0, login, "", held("patch"), 0).expect("there is room");
        world.idle(18 * SECOND_US);
        // Nobody can say any more that its record is gone.
        world.store_leaves();
        world.store_returns_us = None;
        world.idle(3 * SECOND_US);
        assert_eq!(world.clients[number].closed, closed);
    }
}
