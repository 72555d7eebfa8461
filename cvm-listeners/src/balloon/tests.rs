use super::*;
use crate::tests::{Discard, Engine, ask, engine, range};
use cvm_core::Answer;
use std::sync::Arc;

type Discarded = Arc<Mutex<Vec<GpaRange>>>;

fn world() -> (Engine, Discarded, Arc<Balloon<Discard>>) {
    let (engine, discarded) = (engine(), Discarded::default());
    let list = Arc::clone(&discarded);
    let discard: Discard = Box::new(move |range| {
        if range.start().0 == 0 {
            return Err(io::Error::other("pinned"));
        }
        list.lock().unwrap().push(range);
        Ok(())
    });
    let balloon = Arc::new(Balloon::new(engine.memory(), discard));
    engine.add_listener(Arc::clone(&balloon) as _);
    assert_eq!(ask(&engine, 0, 20, Side::Shared).answer(), Answer::Done);
    (engine, discarded, balloon)
}

#[test]
fn shared_pages_are_discarded_and_kept_until_they_are_given_back() {
    let (_, discarded, balloon) = world();
    balloon.inflate(range(2, 4)).unwrap();
    balloon.inflate(range(6, 4)).unwrap();
    assert_eq!(*discarded.lock().unwrap(), [range(2, 4), range(6, 4)]);
    balloon.deflate(range(4, 4)).unwrap();
    assert_eq!((balloon.pages(), balloon.ranges()), (4, vec![range(2, 2), range(8, 2)]));
    assert!(matches!(balloon.deflate(range(2, 4)), Err(BalloonError::NotInside { .. })));
    assert_eq!(balloon.pages(), 4);
}

#[test]
fn a_host_discards_no_private_page() {
    let (_, discarded, balloon) = world();
    let Err(BalloonError::NotShared { gpa }) = balloon.inflate(range(18, 4)) else { panic!("not refused") };
    assert_eq!(gpa, range(20, 1).start());
    assert!(matches!(balloon.report(range(70, 1)), Err(BalloonError::NotShared { .. })));
    assert!(discarded.lock().unwrap().is_empty() && balloon.pages() == 0);
}

#[test]
fn a_page_that_becomes_private_leaves_the_balloon_and_does_not_come_back() {
    let (engine, _, balloon) = world();
    balloon.inflate(range(2, 8)).unwrap();
    assert_eq!(ask(&engine, 4, 2, Side::Private).answer(), Answer::Done);
    assert_eq!(balloon.ranges(), [range(2, 2), range(6, 4)]);
    assert_eq!(ask(&engine, 4, 2, Side::Shared).answer(), Answer::Done);
    assert_eq!(balloon.ranges(), [range(2, 2), range(6, 4)]);
}

#[test]
fn a_page_that_is_being_converted_cannot_be_put_in() {
    let (_, discarded, balloon) = world();
    balloon.prepare(range(4, 2), Side::Private).unwrap();
    assert!(matches!(balloon.inflate(range(2, 4)), Err(BalloonError::Converting { .. })));
    assert!(discarded.lock().unwrap().is_empty());
    balloon.aborted(range(4, 2), Side::Private);
    balloon.inflate(range(2, 4)).unwrap();
    balloon.prepare(range(4, 2), Side::Private).unwrap();
    balloon.aborted(range(4, 2), Side::Private);
    assert_eq!(balloon.ranges(), [range(2, 4)], "a page stays when its conversion is not done");
    balloon.prepare(range(4, 2), Side::Private).unwrap();
    balloon.poisoned(range(4, 2));
    assert_eq!(balloon.ranges(), [range(2, 2)]);
}

#[test]
fn reported_pages_are_freed_and_not_kept_and_a_discard_that_fails_keeps_nothing() {
    let (_, discarded, balloon) = world();
    balloon.report(range(2, 4)).unwrap();
    assert_eq!((discarded.lock().unwrap().len(), balloon.pages()), (1, 0));
    assert!(matches!(balloon.inflate(range(0, 4)), Err(BalloonError::Discard { .. })));
    assert_eq!(balloon.pages(), 0);
}
