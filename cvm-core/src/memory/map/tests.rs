use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
}

const STATES: [PageState; 3] = [PageState::Private, PageState::Shared, PageState::Poisoned];

/// Slots of odd sizes, one gap, and enough pages for several words and blocks.
fn layout() -> Vec<GpaRange> {
    vec![range(3, 70), range(73, 1), range(80, 1290)]
}

/// Puts the pages of `range` that lie in a slot into `state`.
fn set(map: &PageStateMap, range: GpaRange, state: PageState) {
    for part in map.slots().ranges().iter().filter_map(|slot| slot.intersection(&range)) {
        map.set(part, state);
    }
}

proptest! {
    #[test]
    fn the_map_agrees_with_a_plain_list(
        changes in prop::collection::vec((0u64..1400, prop_oneof![1u64..100, 400u64..1400], 0usize..3), 0..40),
        asked in (0u64..1400, 1u64..1400),
    ) {
        let map = PageStateMap::new(Slots::new(&layout()).unwrap()).unwrap();
        let mut model: BTreeMap<u64, PageState> = layout()
            .iter()
            .flat_map(|slot| slot.start().0 / PAGE_SIZE..slot.end().0 / PAGE_SIZE)
            .map(|page| (page, PageState::Private))
            .collect();
        for (start, pages, state) in changes {
            set(&map, range(start, pages), STATES[state]);
            for (_, old) in model.range_mut(start..start + pages) {
                *old = STATES[state];
            }
        }
        for page in 0..1400 {
            prop_assert_eq!(map.get(Gpa(page * PAGE_SIZE + page)), model.get(&page).copied());
        }
        let asked = range(asked.0, asked.1);
        let pages = || asked.start().0 / PAGE_SIZE..asked.end().0 / PAGE_SIZE;
        for state in STATES {
            prop_assert_eq!(map.count(state), model.values().filter(|s| **s == state).count() as u64);
            let expected = pages().find(|page| model.get(page) != Some(&state)).map(|page| Gpa(page * PAGE_SIZE));
            prop_assert_eq!(map.first_not_in(asked, state), expected);
        }
        let listed: Vec<_> = map
            .runs(asked)
            .flat_map(|(run, state)| (0..run.pages()).map(move |page| (run.start().0 / PAGE_SIZE + page, state)))
            .collect();
        let expected: Vec<_> = pages().filter_map(|page| model.get(&page).map(|state| (page, *state))).collect();
        prop_assert_eq!(listed, expected);
        let runs: Vec<_> = map.runs(asked).collect();
        for pair in runs.windows(2) {
            let border = layout().iter().any(|slot| slot.start() == pair[1].0.start());
            prop_assert!(border || pair[0].1 != pair[1].1, "two runs that are one: {pair:?}");
        }
    }
}

/// What it occupies of memory, as far as the system has provided it, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * PAGE_SIZE
}

#[test]
fn a_block_is_uniform_again_when_its_last_page_joins_the_others() {
    let map = PageStateMap::new(Slots::new(&[range(0, 1000)]).unwrap()).unwrap();
    let mixed = |block: usize| uniform(map.first.summary(block)).is_none();
    map.set(range(1, 510), PageState::Shared);
    assert!(mixed(0) && !mixed(1));
    map.set(range(0, 1), PageState::Shared);
    assert!(mixed(0));
    map.set(range(511, 489), PageState::Shared);
    assert_eq!(
        [0, 1].map(|block| uniform(map.first.summary(block))),
        [Some(PageState::Shared); 2],
        "a short last block"
    );
    map.set(range(600, 1), PageState::Private);
    assert_eq!(map.get(Gpa(599 * PAGE_SIZE)), Some(PageState::Shared), "words of an earlier time came back");
}

#[test]
fn a_tebibyte_in_one_state_takes_next_to_no_memory() {
    let before = resident();
    let map = PageStateMap::new(Slots::new(&[range(0, (1 << 40) / PAGE_SIZE)]).unwrap()).unwrap();
    map.set(range(0, (1 << 40) / PAGE_SIZE), PageState::Shared);
    map.set(range(5, 3), PageState::Private);
    assert_eq!(map.count(PageState::Private), 3);
    // Other tests use memory at the same time.
    assert!(resident().saturating_sub(before) < 16 << 20, "a whole map would be 32 MiB");
}

#[test]
fn snapshots_tell_where_two_maps_differ() {
    let map = PageStateMap::new(Slots::new(&layout()).unwrap()).unwrap();
    let before = map.snapshot();
    assert!(before.differences(&before).is_empty());
    set(&map, range(70, 20), PageState::Shared);
    let (private, shared) = (Some(PageState::Private), Some(PageState::Shared));
    let expected = [(range(70, 3), private, shared), (range(73, 1), private, shared), (range(80, 10), private, shared)];
    assert_eq!(before.differences(&map.snapshot()), expected);
    let elsewhere = PageStateMap::new(Slots::new(&[range(3, 70)]).unwrap()).unwrap().snapshot();
    assert_eq!(before.differences(&elsewhere), [(range(73, 1), private, None), (range(80, 1290), private, None)]);
}

#[test]
fn threads_that_change_neighbours_do_not_disturb_each_other_or_readers() {
    let map = PageStateMap::new(Slots::new(&[range(0, 512)]).unwrap()).unwrap();
    std::thread::scope(|scope| {
        for (first, pages) in [(0, 100), (100, 1), (101, 300), (401, 111)] {
            let map = &map;
            scope.spawn(move || {
                for round in 0..2000u64 {
                    let state = STATES[(round % 2) as usize];
                    map.set(range(first, pages), state);
                    assert_eq!(map.first_not_in(range(first, pages), state), None, "round {round}");
                }
            });
        }
    });
    assert_eq!(map.count(PageState::Shared), 512);
}
