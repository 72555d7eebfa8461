//! One deadline for all that a conversion waits for.

use super::*;
use crate::memory::sync::clock;

/// Runs `test` by a clock that only waits move; `then` happens in a wait at the time `at`.
fn by_clock(at: Duration, then: impl FnOnce() + 'static, test: impl FnOnce()) -> Duration {
    clock::run(vec![(at, Box::new(then))], test)
}

/// The wait that ends at the deadline sees it at most this late.
const LATE: Duration = Duration::from_millis(1);

#[test]
fn a_conversion_waits_no_longer_for_claims_and_pins_together_than_for_either() {
    let engine: &'static _ = Box::leak(Box::new(engine(vec![])));
    assert_eq!(ask(engine, 0, 8, Side::Shared).answer, Answer::Done);
    let pinned = engine.memory().memory();
    let claimed = engine.claims.claim(part(4, 1), Deadline::NEVER).unwrap();
    let took = by_clock(
        Duration::from_millis(60),
        || drop(claimed),
        || {
            let refused = ask(engine, 2, 4, Side::Private);
            assert_eq!(refused.answer, Answer::Retry);
            assert!(matches!(refused.cause, Some(Error::Pinned { .. })), "{:?}", refused.cause);
        },
    );
    assert!((PATIENCE..PATIENCE + LATE).contains(&took), "{took:?}");
    drop(pinned);
    assert_eq!(ask(engine, 2, 4, Side::Private).answer, Answer::Done);
}

#[test]
fn a_conversion_that_waits_in_vain_for_another_one_has_the_guest_ask_again_and_leaves_no_claim() {
    let engine: &'static _ = Box::leak(Box::new(engine(vec![])));
    let claimed = engine.claims.claim(part(4, 1), Deadline::NEVER).unwrap();
    let took = by_clock(
        2 * PATIENCE,
        || (),
        || {
            let refused = ask(engine, 2, 4, Side::Shared);
            assert_eq!((refused.answer, refused.reached()), (Answer::Retry, Gpa(2 * PAGE_SIZE)));
            assert!(matches!(refused.cause, Some(Error::Busy { .. })), "{:?}", refused.cause);
            assert_eq!(ask(engine, 2, 2, Side::Shared).answer, Answer::Done, "a claim was left behind");
        },
    );
    assert!((PATIENCE..PATIENCE + LATE).contains(&took), "{took:?}");
    drop(claimed);
    assert_eq!(ask(engine, 2, 4, Side::Shared).answer, Answer::Done);
}

#[test]
fn conversions_that_wait_for_one_pin_at_once_do_not_wait_one_after_the_other() {
    let engine: &'static _ = Box::leak(Box::new(engine(vec![])));
    assert_eq!(ask(engine, 0, 8, Side::Shared).answer, Answer::Done);
    let pinned = engine.memory().memory();
    let other = engine.memory().pins().lock_for_drain();
    let took = by_clock(
        Duration::from_millis(90),
        || drop(other),
        || {
            let refused = ask(engine, 2, 4, Side::Private);
            assert!(matches!(refused.cause, Some(Error::Pinned { .. })), "{:?}", refused.cause);
        },
    );
    assert!((PATIENCE..PATIENCE + LATE).contains(&took), "{took:?}");
    drop(pinned);
}

#[test]
fn many_runs_are_converted_until_the_deadline_and_no_longer() {
    let engine: &'static _ = Box::leak(Box::new(engine(vec![])));
    for page in [1, 3, 5] {
        assert_eq!(ask(engine, page, 1, Side::Shared).answer, Answer::Done);
    }
    let pinned = engine.memory().memory();
    // The pin goes away in the last moment, so that there is no time left for a second run.
    let took = by_clock(
        PATIENCE,
        || drop(pinned),
        || {
            let part = ask(engine, 0, 8, Side::Private);
            assert_eq!((part.answer, part.pages(), part.reached()), (Answer::Retry, 1, Gpa(3 * PAGE_SIZE)));
            assert!(matches!(part.cause, Some(Error::Unfinished { .. })), "{:?}", part.cause);
        },
    );
    assert!((PATIENCE..PATIENCE + LATE).contains(&took), "{took:?}");
}
