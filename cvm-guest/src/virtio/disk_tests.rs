//! The driver of disks on the pool against hosts that do not keep to the protocol.

#![allow(unsafe_code, reason = "requests in flight lend their buffers to the driver")]

use super::QueueHal;
use super::fake::{Host, device_queue, in_use, is_shared, pool};
use virtio_drivers::Error;
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};

/// The device type of a disk (virtio 1.2, section 5).
const DISK: u32 = 2;

/// What the device has of the pool for a read of a sector: slots for header, sector and answer.
const LENT: u64 = 256 + SECTOR_SIZE as u64 + 256;

/// A request and its buffers.
#[derive(Default)]
struct Request {
    request: BlkReq,
    data: Box<[u8]>,
    response: BlkResp,
}

impl Request {
    fn new() -> Self {
        Self { data: vec![0; SECTOR_SIZE].into(), ..Self::default() }
    }
}

/// Writes data and the answer 0, all is well, into the chain of a read.
fn fill(host: &Host, head: u16, data: u8) {
    let header = host.descriptor(0, head);
    let sector = host.descriptor(0, header.next.unwrap());
    host.write_pool(sector.address, &[data; SECTOR_SIZE]);
    host.write_pool(host.descriptor(0, sector.next.unwrap()).address, &[0]);
}

#[test]
fn reads_that_are_answered_in_another_order_come_back_right() {
    device_queue!(Q);
    let (host, transport) = Host::new(DISK, pool::<Q>());
    let mut disk = VirtIOBlk::<QueueHal<Q>, _>::new(transport).unwrap();
    let before = in_use::<Q>();
    let mut requests = [(); 3].map(|()| Request::new());
    let tokens = requests.each_mut().map(|Request { request, data, response }| {
        // SAFETY: the buffers outlive the requests and are not touched until they are done.
        unsafe { disk.read_blocks_nb(1, request, data, response) }.unwrap()
    });
    let heads: Vec<u16> = std::iter::from_fn(|| host.next(0)).collect();
    assert_eq!(heads, tokens);
    for (index, head) in heads.iter().enumerate().rev() {
        assert!(is_shared(pool::<Q>(), host.descriptor(0, *head).address));
        fill(host, *head, index as u8 + 1);
        // How much was written is the device's word, and nobody asks for it.
        host.answer(0, (*head).into(), u32::MAX);
    }
    while let Some(token) = disk.peek_used() {
        let index = tokens.iter().position(|other| *other == token).unwrap();
        let Request { request, data, response } = &mut requests[index];
        // SAFETY: these are the buffers that the token was returned for.
        unsafe { disk.complete_read_blocks(token, request, data, response) }.unwrap();
        assert!(data.iter().all(|byte| *byte == index as u8 + 1));
    }
    assert_eq!(in_use::<Q>(), before);
}

#[test]
fn an_answer_to_what_was_not_asked_is_an_error_and_its_memory_is_not_used_again() {
    device_queue!(Q);
    for id in [1, 3, 15, 16, 0xffff, u32::MAX] {
        let (host, transport) = Host::new(DISK, pool::<Q>());
        let mut disk = VirtIOBlk::<QueueHal<Q>, _>::new(transport).unwrap();
        let before = in_use::<Q>();
        host.answers.borrow_mut().push_back((id, 0));
        assert_eq!(disk.read_blocks(0, &mut [0; SECTOR_SIZE]).unwrap_err(), Error::WrongToken, "{id:#x}");
        // The device may still write there: header, sector and answer stay lent.
        assert_eq!(in_use::<Q>() - before, LENT);
    }
}

#[test]
fn a_request_that_is_answered_twice_is_done_once() {
    device_queue!(Q);
    let (host, transport) = Host::new(DISK, pool::<Q>());
    let mut disk = VirtIOBlk::<QueueHal<Q>, _>::new(transport).unwrap();
    let before = in_use::<Q>();
    let Request { mut request, mut data, mut response } = Request::new();
    // SAFETY: as above.
    let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut data, &mut response) }.unwrap();
    let head = host.next(0).unwrap();
    fill(host, head, 7);
    host.answer(0, head.into(), 513);
    host.answer(0, head.into(), 513);
    // SAFETY: as above.
    unsafe { disk.complete_read_blocks(token, &request, &mut data, &mut response) }.unwrap();
    assert_eq!((data[0], in_use::<Q>()), (7, before));
    // What is left says that a request is done of which the guest knows nothing: it must look up its own.
    assert_eq!(disk.peek_used(), Some(token));
    let mut next = Request::new();
    // SAFETY: as above.
    let other = unsafe { disk.read_blocks_nb(1, &mut next.request, &mut next.data, &mut next.response) }.unwrap();
    // SAFETY: the token is the one that was returned for these buffers.
    let done = unsafe { disk.complete_read_blocks(other, &next.request, &mut next.data, &mut next.response) };
    assert!(
        done.is_ok() || done == Err(Error::WrongToken) || done == Err(Error::IoError) || done == Err(Error::NotReady)
    );
}

#[test]
fn a_device_that_never_answers_keeps_what_it_was_lent_and_nothing_else() {
    device_queue!(Q);
    let (_, transport) = Host::new(DISK, pool::<Q>());
    let before = in_use::<Q>();
    let mut disk = VirtIOBlk::<QueueHal<Q>, _>::new(transport).unwrap();
    let mut requests = [(); 5].map(|()| Request::new());
    for Request { request, data, response } in &mut requests {
        // SAFETY: as above.
        unsafe { disk.read_blocks_nb(0, request, data, response) }.unwrap();
    }
    let mut sixth = Request::new();
    // SAFETY: as above.
    let refused = unsafe { disk.read_blocks_nb(0, &mut sixth.request, &mut sixth.data, &mut sixth.response) };
    assert_eq!((refused, disk.peek_used()), (Err(Error::QueueFull), None));
    drop(disk);
    assert_eq!(in_use::<Q>() - before, 5 * LENT);
}
