use super::*;

#[test]
fn the_class_of_a_length_is_the_smallest_that_holds_it() {
    for len in (0..5000).chain([BLOCK_LEN - 1, BLOCK_LEN]) {
        let class = class_of(len);
        assert!(len <= slot_len(class), "{len}");
        assert!(class == 0 || len > slot_len(class - 1), "{len}");
    }
    assert_eq!(class_of(BLOCK_LEN), CLASSES - 1);
    assert_eq!(class_of(BLOCK_LEN + 1), CLASSES);
    assert!(class_of(usize::MAX) > CLASSES);
}

#[test]
fn the_lowest_bits_are_as_many_as_asked_for() {
    assert_eq!(lowest(0b1011_0100, 2), 0b0001_0100);
    assert_eq!(lowest(u64::MAX, 64), u64::MAX);
    assert_eq!(lowest(0b101, 9), 0b101);
    assert_eq!(lowest(u64::MAX, 0), 0);
}

#[test]
fn a_slot_that_is_given_back_twice_counts_once() {
    let block = Block::new();
    assert!(block.claim_absent() && !block.claim_absent());
    block.unclaim();
    assert!(block.claim());
    assert_eq!(block.open(CLASSES - 2, 9), 2);
    let mut slots = vec![];
    block.collect(CLASSES - 2, 2, 0, |slot| slots.push(slot));
    assert_eq!(slots, [0, 1]);
    assert_eq!([block.give(0, 2), block.give(0, 2), block.give(99999, 1)], [1, 0, 0]);
    assert_eq!(block.purpose(), Purpose::Slots { class: CLASSES - 2, taken: 1 });
    assert!(!block.claim());
    assert_eq!(block.give(0, 3), 1);
    assert_eq!(block.purpose(), Purpose::Empty);
    assert!(block.claim());
}
