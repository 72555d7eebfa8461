//! A real conversion engine with all three listeners over doubles, and what the tests of each share.

use crate::balloon::Balloon;
use crate::iommu::{IommuMapper, LimitedIommu, Limits};
use crate::ranges::RangeSet;
use crate::vhost_user::VhostUser;
use crate::vhost_user::fake::{Fake, Frontend};
use cvm_core::memory::{
    Conversion, ConversionEngine, ConversionListener, ConversionRequest, ConverterError, LeftAs, PageStateMap,
    SharedMemory, Sides, Slots,
};
use cvm_core::{Answer, BoxError, GpaRange, PAGE_SIZE, PageState, Side};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// Pages as a range.
pub(crate) fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
}

/// Two slots that touch in the middle of a block of 16 pages, and one apart.
fn slots() -> [GpaRange; 3] {
    [range(0, 40), range(40, 24), range(80, 16)]
}

/// How a step of the memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Well,
    AsBefore,
    Unknown,
}

type Check = Box<dyn Fn(GpaRange) + Send + Sync>;

/// Memory of which nothing is there but how it fails.
#[derive(Default)]
pub(crate) struct Nothing {
    fates: Mutex<VecDeque<Fate>>,
    /// What to look at in the moment in which a range becomes private.
    check: OnceLock<Check>,
    slow: OnceLock<()>,
}

impl Sides for Nothing {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        if side == Side::Private
            && let Some(check) = self.check.get()
        {
            check(range);
        }
        // Let conversions of other ranges run between the steps of this one.
        if self.slow.get().is_some() {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        let left_as = match self.fates.lock().unwrap().pop_front() {
            None | Some(Fate::Well) => return Ok(()),
            Some(Fate::AsBefore) => LeftAs::Before,
            Some(Fate::Unknown) => LeftAs::Unknown,
        };
        Err(ConverterError { step: "convert", left_as, source: "the memory was told to fail".into() })
    }

    fn discard(&self, _: GpaRange, _: Side) -> Result<(), BoxError> {
        Ok(())
    }

    fn poison(&self, _: GpaRange) -> Result<(), BoxError> {
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        10_000
    }
}

pub(crate) type Engine = ConversionEngine<Nothing>;

/// An engine of which all pages are private.
pub(crate) fn engine() -> Engine {
    let file = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 96 * PAGE_SIZE).unwrap();
    let file = Arc::new(std::fs::File::from(file));
    let regions = slots().map(|slot| {
        let (start, len) = (slot.start().0, slot.len() as usize);
        (GuestAddress(start), len, Some(FileOffset::from_arc(Arc::clone(&file), start)))
    });
    let map = Arc::new(PageStateMap::new(Slots::new(&slots()).unwrap()).unwrap());
    let memory = SharedMemory::new(GuestMemoryMmap::from_ranges_with_files(regions).unwrap(), map).unwrap();
    ConversionEngine::new(Nothing::default(), memory)
}

pub(crate) fn ask_from(engine: &Engine, vcpu: u32, range: GpaRange, to: Side) -> Conversion {
    let request = ConversionRequest::from_guest(vcpu, range.start().0, range.pages(), to);
    engine.ask(request);
    engine.convert(&request)
}

pub(crate) fn ask(engine: &Engine, start: u64, pages: u64, to: Side) -> Conversion {
    ask_from(engine, 0, range(start, pages), to)
}

fn shared(engine: &Engine) -> RangeSet {
    let mut shared = RangeSet::default();
    for (run, state) in engine.memory().map().snapshot().runs() {
        if *state == PageState::Shared {
            shared.insert(*run);
        }
    }
    shared
}

/// What `ranges` cover; panics if two of them have a common page.
fn covered(ranges: &[GpaRange]) -> RangeSet {
    let mut set = RangeSet::default();
    for range in ranges {
        assert!(!set.intersects(*range), "{range} twice");
        set.insert(*range);
    }
    set
}

/// Panics unless `ranges` are the shared pages, byte for byte.
pub(crate) fn assert_shared(engine: &Engine, ranges: &[GpaRange]) {
    assert_eq!(covered(ranges), shared(engine));
}

pub(crate) type Discard = Box<dyn Fn(GpaRange) -> io::Result<()> + Send + Sync>;

/// An engine with all listeners.
struct World {
    engine: Engine,
    iommu: Arc<LimitedIommu>,
    mapper: Arc<IommuMapper<Arc<LimitedIommu>>>,
    fake: Arc<Fake>,
    vhost: Arc<VhostUser<Frontend>>,
    balloon: Arc<Balloon<Discard>>,
}

impl World {
    fn new(mappings: u64, slots: Option<u64>) -> Self {
        let engine = engine();
        let iommu = Arc::new(LimitedIommu::new(mappings));
        let limits = Limits { mappings, block: 16 * PAGE_SIZE };
        let mapper = Arc::new(IommuMapper::new("iommu", Arc::clone(&iommu), engine.memory(), limits).unwrap());
        let fake = Fake::new(slots.unwrap_or(0));
        let acked = match slots {
            Some(_) => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            None => VhostUserProtocolFeatures::empty(),
        };
        let frontend = Frontend(Arc::clone(&fake));
        let vhost = Arc::new(VhostUser::new("vhost", frontend, engine.memory(), acked).unwrap());
        let balloon = Arc::new(Balloon::new(engine.memory(), Box::new(|_| Ok(())) as Discard));
        let listeners: [Arc<dyn ConversionListener>; 3] = [mapper.clone(), vhost.clone(), balloon.clone()];
        listeners.into_iter().for_each(|listener| engine.add_listener(listener));
        let reached = (Arc::clone(&iommu), Arc::clone(&fake));
        let check: Check = Box::new(move |range| {
            assert!(!reached.0.reaches(range), "devices reach {range}, which becomes private");
            assert!(!reached.1.reaches(range), "the backend reaches {range}, which becomes private");
        });
        assert!(engine.converter().check.set(check).is_ok());
        Self { engine, iommu, mapper, fake, vhost, balloon }
    }

    fn fail(&self, iommu: Vec<bool>, vhost: Vec<bool>, memory: Vec<Fate>) {
        self.iommu.fail(iommu);
        *self.fake.failures.lock().unwrap() = vhost.into();
        *self.engine.converter().fates.lock().unwrap() = memory.into();
    }

    /// What must hold whatever fails, and what must hold after what failed was tried again.
    fn check(&self) {
        let shared = shared(&self.engine);
        for outside in [self.iommu.mappings(), self.fake.regions()] {
            assert!(covered(&outside).runs().all(|run| shared.contains(run)), "more than what is shared");
        }
        self.fail(vec![], vec![], vec![]);
        self.mapper.mend().unwrap();
        self.vhost.mend().unwrap();
        assert_shared(&self.engine, &self.iommu.mappings());
        assert_shared(&self.engine, &self.vhost.regions());
        // A table of no regions cannot be sent, and is not needed: nothing was ever shared then.
        assert_shared(&self.engine, &self.fake.regions());
        assert_eq!((self.iommu.refused(), &*self.fake.refused.lock().unwrap()), (0, &vec![]), "beyond a limit");
        assert!(self.balloon.ranges().into_iter().all(|range| shared.contains(range)), "private pages in the balloon");
    }
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![6 => Just(Fate::Well), 2 => Just(Fate::AsBefore), 1 => Just(Fate::Unknown)]
}

fn failures() -> impl Strategy<Value = Vec<bool>> {
    prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(any::<bool>(), 0..8)]
}

#[derive(Debug, Clone)]
enum Step {
    Convert(Side, Vec<bool>, Vec<bool>, Vec<Fate>),
    Inflate,
    Deflate,
    Compact,
}

fn step() -> impl Strategy<Value = Step> {
    let side = prop_oneof![Just(Side::Shared), Just(Side::Private)];
    let fates = prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(fate(), 1..3)];
    prop_oneof![
        12 => (side, failures(), failures(), fates).prop_map(|(to, iommu, vhost, fates)| Step::Convert(to, iommu, vhost, fates)),
        2 => Just(Step::Inflate),
        1 => Just(Step::Deflate),
        1 => Just(Step::Compact),
    ]
}

proptest! {
    #[test]
    fn what_others_reach_is_what_is_shared_whatever_fails(
        mappings in prop_oneof![3u64..12, Just(1000)],
        slots in prop_oneof![Just(None), (2u64..10).prop_map(Some)],
        steps in prop::collection::vec((step(), 0u64..96, 1u64..40), 1..40),
    ) {
        let world = World::new(mappings, slots);
        for (step, start, pages) in steps {
            let range = range(start, pages);
            match step {
                Step::Convert(to, iommu, vhost, fates) => {
                    world.fail(iommu, vhost, fates);
                    let _ = ask_from(&world.engine, 0, range, to);
                }
                Step::Inflate => drop(world.balloon.inflate(range)),
                Step::Deflate => drop(world.balloon.deflate(range)),
                Step::Compact => world.mapper.compact().unwrap(),
            }
            world.check();
        }
    }
}

#[test]
fn threads_that_convert_at_once_leave_what_is_shared_and_stay_within_the_limits() {
    for (mappings, slots) in [(1000, None), (6, Some(500)), (8, Some(6)), (1000, Some(500))] {
        let world = World::new(mappings, slots);
        world.engine.converter().slow.set(()).unwrap();
        std::thread::scope(|scope| {
            for vcpu in 0..4u32 {
                let world = &world;
                scope.spawn(move || {
                    let mut random = u64::from(vcpu) + 1;
                    for _ in 0..400 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let (start, pages) = ((random >> 33) % 90, (random >> 50) % 12 + 1);
                        let to = if random >> 63 == 0 { Side::Shared } else { Side::Private };
                        let answer = ask_from(&world.engine, vcpu, range(start, pages), to).answer();
                        if answer == Answer::Done && to == Side::Shared {
                            let _ = world.balloon.inflate(range(start, 1));
                        }
                    }
                });
            }
        });
        world.check();
    }
}
