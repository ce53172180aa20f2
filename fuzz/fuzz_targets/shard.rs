//! Operations on whole shards: the simulator's world, whose chance is the input. Two bytes are one throw of its dice.
//! What must hold is checked by the world and its clients (`tests/sim`).
#![no_main]

#[path = "../../tests/sim/authority.rs"]
#[allow(dead_code, reason = "scripts of the simulator use more of a world than chance does")]
mod authority;
#[path = "../../tests/sim/client.rs"]
mod client;
#[path = "../../tests/sim/deeds.rs"]
#[allow(dead_code, reason = "scripts of the simulator use more of a world than chance does")]
mod deeds;
#[path = "../../tests/sim/dice.rs"]
mod dice;
#[path = "../../tests/sim/direct.rs"]
#[allow(dead_code, reason = "scripts of the simulator use more of a world than chance does")]
mod direct;
#[path = "../../tests/hall/ephemerals.rs"]
#[allow(dead_code, reason = "halls ask more of it")]
mod ephemerals;
#[path = "../../tests/sim/law.rs"]
mod law;
#[path = "../../tests/sim/managed.rs"]
mod managed;
#[path = "../../tests/sim/store.rs"]
mod store;
#[path = "../../tests/sim/upstream.rs"]
#[allow(dead_code, reason = "scripts of the simulator use more of a world than chance does")]
mod upstream;
#[path = "../../tests/sim/world.rs"]
#[allow(dead_code, reason = "scripts of the simulator use more of a world than chance does")]
mod world;

/// Steps of one world, whatever the input's length.
const STEPS_MAX: usize = 300;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut world = world::World::new(dice::Dice::from(data));
    world.setup.steps = (data.len() / 8).min(STEPS_MAX);
    world.run();
});
