//! Where there may be something free, so that nobody looks through all blocks of a large pool.
//!
//! For 64 blocks and each class, and for blocks that are free for any purpose, a word has a bit for each block that may
//! have such slots, or be such a block. The bit of a block that has some is set, or about to be; that of one that has
//! none is cleared by whoever looked there in vain. The words lie beside the counters of the 64 blocks' first eight.

use super::block::{Block, CLASSES};
use super::chunk::BLOCKS;
use crate::sync::{AtomicU64, Ordering::SeqCst};

/// Instead of a class: blocks that are free for any purpose.
pub(super) const EMPTY: usize = CLASSES;

/// How many words of summaries each block has room for.
pub(super) const WORDS: usize = (EMPTY + 1).div_ceil(BLOCKS);

/// How many blocks have bits in one word.
const GROUP: usize = u64::BITS as usize;

fn word(blocks: &[Block], group: usize, what: usize) -> Option<&AtomicU64> {
    blocks.get(group * GROUP + what % BLOCKS).map(|block| block.summary(what / BLOCKS))
}

/// Notes that the block at `index` has some of `what`.
pub(super) fn announce(blocks: &[Block], index: usize, what: usize) {
    let bit = 1 << (index % GROUP);
    // In one order with `seek`: either this sees that the bit is gone, or he who cleared it sees what there is.
    if let Some(word) = word(blocks, index / GROUP, what).filter(|word| word.load(SeqCst) & bit == 0) {
        word.fetch_or(bit, SeqCst);
    }
}

/// What `attempt` gets of the first block that it gets something of, among those that may have some of `what`, from the
/// 64 blocks on that `near` is in. `missed` is called if there was something that others may not have seen meanwhile.
pub(super) fn seek<R>(
    blocks: &[Block],
    what: usize,
    near: usize,
    mut attempt: impl FnMut(usize) -> Option<R>,
    missed: impl Fn(),
) -> Option<R> {
    let groups = blocks.len().div_ceil(GROUP);
    let first = near / GROUP;
    for group in (first..groups).chain(0..first) {
        let Some(word) = word(blocks, group, what) else { continue };
        let mut bits = word.load(SeqCst);
        while bits != 0 {
            let (index, bit) = (group * GROUP + bits.trailing_zeros() as usize, bits & bits.wrapping_neg());
            if let Some(found) = attempt(index) {
                return Some(found);
            }
            word.fetch_and(!bit, SeqCst);
            if blocks.get(index).is_some_and(|block| block.has(what)) {
                word.fetch_or(bit, SeqCst);
                missed();
            }
            bits &= !bit;
        }
    }
    None
}

/// Every interleaving of one who looks and one who gives back.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    const TWO: usize = CLASSES - 2;

    fn look(blocks: &[Block], what: usize) -> bool {
        let attempt = |index: usize| match what {
            EMPTY => blocks[index].claim().then_some(()),
            class => (blocks[index].reserve(class, 1) > 0).then_some(()),
        };
        seek(blocks, what, 0, attempt, || ()).is_some()
    }

    #[test]
    fn what_is_given_back_while_somebody_looks_is_found_afterwards() {
        for what in [TWO, EMPTY] {
            loom::model(move || {
                let blocks: Arc<Vec<Block>> = Arc::new((0..BLOCKS).map(|_| Block::new()).collect());
                blocks[0].claim_absent();
                // One slot is given back of two that are taken, or of one.
                let taken = if what == EMPTY { 1 } else { 2 };
                blocks[0].open(TWO, taken);
                blocks[0].collect(TWO, taken, 0, |_| ());
                // As it is after others gave back and took again.
                announce(&blocks, 0, what);
                let other = thread::spawn({
                    let blocks = Arc::clone(&blocks);
                    move || {
                        blocks[0].give(0, 1);
                        announce(&blocks, 0, what);
                    }
                });
                let found = look(&blocks, what);
                other.join().unwrap();
                assert!(found || look(&blocks, what));
            });
        }
    }
}
