//! Random operations on an engine with listeners and devices, compared with a plain model after each.

mod world;

use world::{Seed, World};

/// How many operations: `$CVM_OPERATIONS`, or as many as take a few seconds. Ten million are the long lane.
fn operations() -> u64 {
    std::env::var("CVM_OPERATIONS").ok().map_or(20_000, |count| count.parse().expect("$CVM_OPERATIONS is a number"))
}

/// After so many operations a new world begins: its pages are lost one by one to failures.
const LIFE: u64 = 2000;

#[test]
fn whatever_happens_engine_listeners_view_and_model_agree() {
    for life in 0..operations().div_ceil(LIFE) {
        let (mut world, mut seed) = (World::new(), Seed(0x9e37_79b9_7f4a_7c15 ^ (life + 1)));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for operation in 0..LIFE {
                world.step(&mut seed);
                if operation % 50 == 0 {
                    world.check();
                }
            }
            world.check();
        }));
        assert!(result.is_ok(), "in life {life}");
    }
}
