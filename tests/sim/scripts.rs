//! Worlds that follow a script: one for each fault that was found, and for what chance meets too seldom.

use super::client::{Held, Kind};
use super::dice::Dice;
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
fn what_agents_do_not_see_moves_nothing_of_theirs_and_a_new_role_moves_them() {
    let mut world = world(Setup { cores: 2, ..Setup::plain() });
    // Companies are roles here: 0 are agents.
    let mut of =
        |kind, company| world.open(kind, 0, company, HOUR_US, "roled", held("patch"), 0).expect("there is room");
    let agents = [of(Kind::Single, 0), of(Kind::Events, 0)];
    let admins = [of(Kind::Single, 1), of(Kind::Events, 1)];
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
    world.renew(agents[0], 1, HOUR_US);
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
        for round in 0..10 {
            let mut dice = Dice::seeded(round);
            world.book.upstream.renew_all(&mut dice);
            world.pass_time(SECOND_US);
            if round == 5 {
                // A frame that is started from now on fails the client that gets it.
                world.log_out("u3");
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
    for _ in 0..5_000 {
        watch(&mut world, Kind::Single, HOUR_US, 0);
    }
    world.idle(SECOND_US);
    let others = |world: &World| world.clients.iter().filter(|client| client.closed.is_none()).count();
    assert_eq!(others(&world), 5_000);
    // The second and third come while the first pass is not long ago: they wait for the next, and nobody for them longer.
    let jtis: Vec<u64> = [10, 20, 30].map(|number: usize| world.clients[number].tokens[0].jti).to_vec();
    world.revoke(jtis[0]);
    world.turn(0);
    for _ in 0..16 {
        world.turn(0);
    }
    assert_eq!(others(&world), 4_999);
    world.book.said.revoked.clear();
    for jti in &jtis[1..] {
        world.hear_late(*jti);
    }
    world.turn(0);
    assert_eq!(others(&world), 4_999, "they wait");
    world.idle(30_000);
    assert_eq!(others(&world), 4_997, "not for long");
}

#[test]
fn permissions_that_change_take_a_stream_away_and_let_it_be_had_again() {
    let mut world = world(Setup::plain());
    let single = world.open(Kind::Single, 0, 0, HOUR_US, "guarded", held("patch"), 0).expect("there is room");
    let many = world.open(Kind::Many, 0, 0, HOUR_US, "", Held::default(), 0).expect("there is room");
    world.idle(SECOND_US);
    for name in ["guarded", "slow"] {
        world.subscribe(many, name, held("patch"), 0);
    }
    world.idle(SECOND_US);
    let subs = [single, many].map(|number| world.clients[number].sub.clone());
    subs.iter().for_each(|sub| world.guard(sub, false));
    change(&mut world);
    assert_eq!(world.clients[single].closed, Some(4003));
    assert_eq!(world.clients[many].held.keys().collect::<Vec<_>>(), ["slow"]);
    world.guard(&subs[1], true);
    world.subscribe(many, "guarded", held("patch"), 0);
    change(&mut world);
    assert_eq!(world.clients[many].held.len(), 2);
}
