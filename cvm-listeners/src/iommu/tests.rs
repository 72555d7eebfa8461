use super::*;
use crate::tests::{Engine, ask, assert_shared, engine, range};
use cvm_core::Answer;

/// An engine with a mapper for blocks of 16 pages.
fn world(mappings: u64) -> (Engine, Arc<LimitedIommu>, Arc<IommuMapper<Arc<LimitedIommu>>>) {
    let (engine, iommu) = (engine(), Arc::new(LimitedIommu::new(mappings)));
    let limits = Limits { mappings, block: 16 * PAGE_SIZE };
    let mapper = Arc::new(IommuMapper::new("iommu", Arc::clone(&iommu), engine.memory(), limits).unwrap());
    engine.add_listener(Arc::clone(&mapper) as _);
    (engine, iommu, mapper)
}

fn cause(conversion: &cvm_core::Conversion) -> String {
    conversion.cause().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn what_is_shared_at_once_is_a_mapping_for_each_block_and_slot() {
    let (engine, iommu, _) = world(100);
    assert_eq!(ask(&engine, 4, 60, Side::Shared).answer(), Answer::Done);
    let expected = [range(4, 12), range(16, 16), range(32, 8), range(40, 8), range(48, 16)];
    assert_eq!(iommu.mappings(), expected, "the border of the slots is at page 40");
}

#[test]
fn a_block_taken_back_whole_disturbs_no_other_mapping() {
    let (engine, iommu, mapper) = world(100);
    assert_eq!(ask(&engine, 0, 64, Side::Shared).answer(), Answer::Done);
    let calls = iommu.calls();
    assert_eq!(ask(&engine, 16, 16, Side::Private).answer(), Answer::Done);
    assert_eq!((iommu.calls() - calls, mapper.usage().remapped), (1, 0));
    assert_shared(&engine, &iommu.mappings());
}

#[test]
fn a_page_from_the_middle_of_a_mapping_leaves_two() {
    let (engine, iommu, mapper) = world(100);
    assert_eq!(ask(&engine, 0, 16, Side::Shared).answer(), Answer::Done);
    assert_eq!(ask(&engine, 5, 1, Side::Private).answer(), Answer::Done);
    assert_eq!(iommu.mappings(), [range(0, 5), range(6, 10)]);
    assert_eq!(mapper.usage(), Usage { mappings: 2, mapped: 15, absent: 0, remapped: 2 });
}

#[test]
fn neighbours_are_merged_when_mappings_run_out_and_not_before() {
    let (engine, iommu, mapper) = world(4);
    for page in 0..4 {
        assert_eq!(ask(&engine, page, 1, Side::Shared).answer(), Answer::Done);
    }
    assert_eq!((iommu.mappings().len(), mapper.usage().remapped), (4, 0));
    assert_eq!(ask(&engine, 4, 1, Side::Shared).answer(), Answer::Done);
    assert_eq!(iommu.mappings(), [range(0, 4), range(4, 1)]);
    mapper.compact().unwrap();
    assert_eq!(iommu.mappings(), [range(0, 5)]);
}

#[test]
fn the_last_mapping_is_used_too_and_an_abort_needs_no_other_one() {
    let (engine, iommu, mapper) = world(2);
    assert_eq!(ask(&engine, 0, 16, Side::Shared).answer(), Answer::Done);
    mapper.prepare(range(5, 1), Side::Private).unwrap();
    assert_eq!(iommu.mappings(), [range(0, 5), range(6, 10)]);
    assert!(matches!(mapper.prepare(range(20, 1), Side::Shared), Err(Objection::Wait(_))), "it may need one soon");
    mapper.aborted(range(5, 1), Side::Private);
    assert_shared(&engine, &iommu.mappings());
    assert_eq!(ask(&engine, 5, 1, Side::Private).answer(), Answer::Done);
    assert_eq!(ask(&engine, 5, 1, Side::Shared).answer(), Answer::Done, "the gap closes");
    assert_eq!((iommu.mappings(), iommu.refused()), (vec![range(0, 16)], 0));
}

#[test]
fn who_needs_more_mappings_than_there_are_hears_how_many_and_in_which_blocks_to_convert() {
    let (engine, iommu, _) = world(3);
    for page in [0, 2, 4] {
        assert_eq!(ask(&engine, page, 1, Side::Shared).answer(), Answer::Done);
    }
    let refused = ask(&engine, 6, 1, Side::Shared);
    assert_eq!(refused.answer(), Answer::Invalid);
    let text = cause(&refused);
    assert!(text.contains("3 DMA mappings") && text.contains("blocks of 64 KiB"), "{text}");
    assert_shared(&engine, &iommu.mappings());
    assert_eq!(ask(&engine, 2, 1, Side::Private).answer(), Answer::Done, "taking back a whole mapping needs none");
    assert_eq!(ask(&engine, 6, 1, Side::Shared).answer(), Answer::Done);
}

#[test]
fn a_page_that_cannot_be_unmapped_does_not_become_private() {
    let (engine, iommu, _) = world(100);
    assert_eq!(ask(&engine, 0, 48, Side::Shared).answer(), Answer::Done);
    iommu.fail([false, true]);
    let refused = ask(&engine, 10, 20, Side::Private);
    assert_eq!(refused.answer(), Answer::Retry);
    assert!(cause(&refused).contains("failed to unmap"), "{}", cause(&refused));
    assert_shared(&engine, &iommu.mappings());
}

#[test]
fn what_is_left_of_a_mapping_and_cannot_be_mapped_is_a_refusal_and_tried_again() {
    let (engine, iommu, mapper) = world(100);
    assert_eq!(ask(&engine, 0, 16, Side::Shared).answer(), Answer::Done);
    iommu.fail([false, true, true, true, true]);
    assert_eq!(ask(&engine, 5, 1, Side::Private).answer(), Answer::Retry);
    assert!(mapper.usage().absent > 0);
    iommu.fail([]);
    mapper.mend().unwrap();
    assert_shared(&engine, &iommu.mappings());
}

#[test]
fn nothing_more_becomes_shared_before_what_is_shared_is_mapped() {
    let (engine, iommu, mapper) = world(100);
    iommu.fail([true, true]);
    assert_eq!(ask(&engine, 0, 1, Side::Shared).answer(), Answer::Done, "it is shared, whatever the IOMMU says");
    assert_eq!(mapper.usage().absent, 1);
    assert_eq!(ask(&engine, 4, 1, Side::Shared).answer(), Answer::Retry);
    assert_eq!(ask(&engine, 4, 1, Side::Shared).answer(), Answer::Done);
    assert_shared(&engine, &iommu.mappings());
}

#[test]
fn a_mapper_that_comes_late_maps_what_is_shared_already() {
    let engine = engine();
    assert_eq!(ask(&engine, 10, 20, Side::Shared).answer(), Answer::Done);
    let mapper = |mappings| {
        let limits = Limits { mappings, block: 16 * PAGE_SIZE };
        IommuMapper::new("iommu", LimitedIommu::new(mappings), engine.memory(), limits)
    };
    assert_shared(&engine, &mapper(2).unwrap().dma().mappings());
    assert!(matches!(mapper(1), Err(MapperError::TooMany { most: 1 })));
    assert!(matches!(mapper(0), Err(MapperError::Limits(_))));
}

#[test]
fn the_double_refuses_what_a_kernel_does() {
    let (engine, iommu) = (engine(), LimitedIommu::new(2));
    let backing = engine.memory().backing(range(0, 1)).unwrap();
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    iommu.map(range(0, 4), &backing).unwrap();
    assert_eq!(errno(iommu.map(range(3, 4), &backing)), Some(17));
    assert_eq!(errno(iommu.unmap(range(0, 2))), Some(22));
    assert_eq!(errno(iommu.unmap(range(8, 2))), Some(2));
    iommu.map(range(4, 4), &backing).unwrap();
    assert_eq!(errno(iommu.map(range(8, 4), &backing)), Some(28));
    iommu.unmap(range(0, 8)).unwrap();
    assert!(iommu.mappings().is_empty() && iommu.refused() == 4);
}
