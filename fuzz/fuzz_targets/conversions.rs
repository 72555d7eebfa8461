//! Whatever guests, devices and hosts do to a conversion engine, against a plain model, with failures at every step.

#![no_main]

#[path = "../../cvm-core/tests/world/mod.rs"]
mod world;

use libfuzzer_sys::fuzz_target;
use world::{Given, World};

fuzz_target!(|bytes: &[u8]| {
    let mut world = World::new();
    let mut decisions = Given(bytes);
    while !decisions.0.is_empty() {
        world.step(&mut decisions);
    }
    world.check();
});
