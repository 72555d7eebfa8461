//! The vault as a VMM finds it that does not keep to the rules, and VMMs as they find a vault that dies.
//!
//! The hostile VMM here starts the vault's program itself, and says to it whatever it likes.

mod common;

use common::*;
use cvm_backend_kvm::vault::protocol::{Given, Message, Order, Reply, Report, Request};
use cvm_backend_kvm::{Error as KvmError, KvmPlatform};
use cvm_core::doorbell::{Doorbell, PORT_BASE, Transport, device_base};
use cvm_core::interrupt::{InterruptController, Refusal};
use cvm_core::x86::{Register, VcpuState, identity_map};
use cvm_core::{
    Answer, Error, Event, Exit, Gpa, GpaRange, Measurement, PAGE_SIZE, PageKind, Platform, Policy, Protection, Side,
    Trigger, Vcpu, Vm,
};
use iced_x86::IcedError;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_setfl, ftruncate, memfd_create};
use rustix::io::{Errno, FdFlags, ReadWriteFlags, fcntl_setfd, preadv2};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::futex;
use std::fs::{self, File, Permissions};
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use zerocopy::{FromBytes, IntoBytes};

/// How long a vault may take for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a whole test may take where processors are emulated.
const LIMIT: Duration = Duration::from_secs(120);

/// Makes a test the only one that has vaults and files, and ends the whole program if it hangs: its vaults end with it.
struct Alone {
    _turn: MutexGuard<'static, ()>,
    _done: Sender<()>,
}

impl Alone {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        // A test that failed has left nothing.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, is_done) = channel();
        let name = thread::current().name().unwrap_or_default().to_owned();
        thread::spawn(move || {
            if is_done.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                let _ = std::io::stderr().write_all(format!("{name} hangs\n").as_bytes());
                process::abort();
            }
        });
        Self { _turn: turn, _done: done }
    }
}

/// What a test needs: this host's KVM with vaults, and its turn, which ends last.
struct Vaults {
    platform: KvmPlatform,
    _alone: Alone,
}

fn vaults() -> Option<Vaults> {
    let _alone = Alone::new();
    kvm()?;
    let platform = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::Vault)).unwrap();
    Some(Vaults { platform, _alone })
}

/// Processes that this one has started and not heard the end of.
fn children() -> Vec<Pid> {
    let child = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name, in parentheses, may have anything in it.
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()?;
        (parent == process::id()).then(|| Pid::from_raw(pid)).flatten()
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| child(entry.ok()?)).collect()
}

// A hostile VMM

/// What a packet was answered with.
#[derive(Debug)]
enum Heard {
    Report(Report, Vec<OwnedFd>),
    /// The vault has closed its socket.
    Gone,
}

/// A vault, and the other end of its socket.
struct Vault {
    process: Child,
    socket: Option<OwnedFd>,
    sequence: u32,
}

impl Vault {
    fn start() -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        set_socket_timeout(&ours, Timeout::Recv, Some(PATIENCE)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvm-vault"));
        command.arg0("cvm-vault").arg("/dev/kvm").env_clear().env("CVM_IS_VAULT", "1");
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        let vault = Self { process: command.spawn().unwrap(), socket: Some(ours), sequence: 0 };
        // What is left of the command has the vault's end of the socket.
        drop(command);
        assert!(matches!(vault.hear(), Heard::Report(Report::Done, _)));
        vault
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().unwrap().as_fd()
    }

    fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(descriptors.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        sendmsg(self.socket(), &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next report, which has to come in time.
    fn hear(&self) -> Heard {
        let mut bytes = [0; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(self.socket(), &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let len = match received {
            Ok(received) if received.bytes > 0 => received.bytes,
            Ok(_) | Err(Errno::CONNRESET) => return Heard::Gone,
            Err(error) => panic!("the vault does not answer: {error}"),
        };
        let descriptors = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let descriptors = descriptors.flatten().collect();
        let (message, text) = Message::read_from_prefix(&bytes[..len]).unwrap();
        Heard::Report(Report::decode(&message, text).unwrap(), descriptors)
    }

    /// An order as a packet with this sequence number.
    fn packet(order: &Order, sequence: u32) -> Vec<u8> {
        let (message, text) = order.encode();
        [Message { sequence, ..message }.as_bytes(), text.as_bytes()].concat()
    }

    fn order_with(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Heard {
        self.sequence = self.sequence.wrapping_add(1);
        self.send(&Self::packet(order, self.sequence), descriptors);
        self.hear()
    }

    fn order(&mut self, order: &Order) -> Report {
        match self.order_with(order, &[]) {
            Heard::Report(report, _) => report,
            Heard::Gone => panic!("{order:?} has ended the vault"),
        }
    }

    #[track_caller]
    fn done(&mut self, order: &Order) {
        assert_eq!(self.order(order), Report::Done, "{order:?}");
    }

    /// The vault's reason to refuse an order.
    #[track_caller]
    fn refused(&mut self, order: &Order) -> String {
        match self.order(order) {
            Report::Failed(reason) => reason,
            report => panic!("{order:?}: {report:?}"),
        }
    }

    /// How it ends, in time.
    fn end(&mut self, limit: Duration) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < limit, "the vault does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn file(bytes: u64) -> File {
    let file = memfd_create("cvm-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    file.into()
}

fn sealed_file(bytes: u64) -> File {
    let file = file(bytes);
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    file
}

fn create(vcpus: u32) -> Order {
    Order::Create {
        vcpus,
        policy: Policy::empty(),
        doorbell: Doorbell::Port,
        transport: Transport::Doorbell,
        interrupt_controller: InterruptController::None,
    }
}

/// A VM that is being loaded.
struct Loading {
    vault: Vault,
    shared: File,
    pages: File,
    kicks: OwnedFd,
    vcpus: u32,
}

impl Loading {
    fn start(vcpus: u32) -> Self {
        let mut vault = Vault::start();
        vault.done(&Order::Slot(range(0, MEMORY / PAGE_SIZE)));
        let (shared, pages) = (sealed_file(MEMORY), sealed_file(u64::from(vcpus) * PAGE_SIZE));
        let created = vault.order_with(&create(vcpus), &[shared.as_fd(), pages.as_fd()]);
        let Heard::Report(Report::Done, mut descriptors) = created else { panic!("{created:?}") };
        let kicks = descriptors.pop().expect("it gives a way to kick");
        Self { vault, shared, pages, kicks, vcpus }
    }

    fn load(&mut self, gpa: u64, contents: &[u8]) {
        self.shared.write_all_at(contents, gpa).unwrap();
        let pages = (contents.len() as u64).div_ceil(PAGE_SIZE);
        self.vault.done(&Order::Load { range: range(gpa, pages), kind: PageKind::Measured });
    }

    fn state(index: u32) -> Order {
        Order::SetVcpu { index, state: VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), index, Gpa(BOOT_PAGE)) }
    }

    fn load_all(&mut self, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) {
        self.load(CODE, &assemble(&config(self.vcpus), CODE, write));
        self.load(TABLES, &identity_map(Gpa(TABLES), MEMORY, None).unwrap());
        (0..self.vcpus).for_each(|index| self.vault.done(&Self::state(index)));
    }

    fn seal(mut self) -> (Hostage, Measurement) {
        let Report::Sealed(measurement) = self.vault.order(&Order::Seal) else { panic!("it is not sealed") };
        let len = self.vcpus as usize * PAGE_SIZE as usize;
        let pages = MmapRegion::from_file(FileOffset::new(self.pages, 0), len).unwrap();
        let last = vec![0; self.vcpus as usize];
        (Hostage { vault: self.vault, shared: self.shared, kicks: self.kicks, pages, last }, measurement)
    }
}

/// A guest whose VMM does what it likes.
struct Hostage {
    vault: Vault,
    shared: File,
    kicks: OwnedFd,
    pages: MmapRegion,
    /// The number of the last request on each page.
    last: Vec<u32>,
}

/// Where things are on a page.
mod at {
    pub const REQUEST: usize = 0;
    pub const REQUEST_MESSAGE: usize = 64;
    pub const REPLY: usize = 192;
    pub const REPLY_MESSAGE: usize = 256;
    pub const KICK: usize = 384;
    pub const REQUEST_TEXT: usize = 512;
    pub const REPLY_TEXT: usize = 1024;
}

/// The first vCPU.
const FIRST: u32 = 0;

impl Hostage {
    fn start(vcpus: u32, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Self {
        let mut loading = Loading::start(vcpus);
        loading.load_all(write);
        loading.seal().0
    }

    fn word(&self, vcpu: u32, at: usize) -> &AtomicU32 {
        self.pages.get_atomic_ref(vcpu as usize * PAGE_SIZE as usize + at).unwrap()
    }

    /// Fills a part of a page.
    fn fill(&self, vcpu: u32, at: usize, bytes: &[u8]) {
        self.pages.as_volatile_slice().write_slice(bytes, vcpu as usize * PAGE_SIZE as usize + at).unwrap();
    }

    /// Says that there is a request, and wakes whoever sleeps until then.
    fn ring(&self, vcpu: u32, sequence: u32) {
        let word = self.word(vcpu, at::REQUEST);
        word.store(sequence, Ordering::SeqCst);
        futex::wake(word, futex::Flags::empty(), 1).unwrap();
    }

    fn post(&self, vcpu: u32, sequence: u32, message: &Message, text: &[u8]) {
        for (word, bytes) in (0..).zip(message.as_bytes().chunks_exact(8)) {
            let at = vcpu as usize * PAGE_SIZE as usize + at::REQUEST_MESSAGE + 8 * word;
            let slot: &AtomicU64 = self.pages.get_atomic_ref(at).unwrap();
            slot.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        self.fill(vcpu, at::REQUEST_TEXT, text);
        self.ring(vcpu, sequence);
    }

    /// The reply with this number, which has to come in time; nothing if the vault has ended.
    fn hear(&mut self, vcpu: u32, sequence: u32) -> Option<Reply> {
        let begin = Instant::now();
        let mut looks = 0;
        while self.word(vcpu, at::REPLY).load(Ordering::SeqCst) != sequence {
            assert!(begin.elapsed() < PATIENCE, "the vault does not reply");
            looks += 1;
            if looks > 1000 {
                thread::sleep(Duration::from_micros(20));
                if looks % 100 == 0 && self.vault.process.try_wait().unwrap().is_some() {
                    return None;
                }
            }
        }
        let (mut message, base) = (Message::default(), vcpu as usize * PAGE_SIZE as usize);
        let page = self.pages.as_volatile_slice();
        page.read_slice(message.as_mut_bytes(), base + at::REPLY_MESSAGE).unwrap();
        let mut text = vec![0; usize::from(message.text)];
        page.read_slice(&mut text, base + at::REPLY_TEXT).unwrap();
        assert_eq!(message.sequence, sequence);
        Some(Reply::decode(vcpu, &message, &text).unwrap())
    }

    fn next(&mut self, vcpu: u32) -> u32 {
        let last = &mut self.last[vcpu as usize];
        *last = (*last + 1) & !(1 << 31);
        *last
    }

    fn ask(&mut self, vcpu: u32, request: &Request) -> Reply {
        let sequence = self.next(vcpu);
        let (message, text) = request.encode();
        self.post(vcpu, sequence, &Message { sequence, ..message }, text.as_bytes());
        self.hear(vcpu, sequence).expect("the vault has ended")
    }

    #[track_caller]
    fn refused(&mut self, request: &Request) {
        let reply = self.ask(FIRST, request);
        assert!(matches!(reply, Reply::Refused(_)), "{request:?}: {reply:?}");
    }

    /// Runs the first vCPU up to its next exit.
    #[track_caller]
    fn run(&mut self, given: Given) -> Exit {
        match self.ask(FIRST, &Request::Run(given)) {
            Reply::Exit(exit) => exit,
            reply => panic!("no exit: {reply:?}"),
        }
    }
}

/// What the guest keeps to itself.
const SECRET: u32 = 0x5ec2_e751;
/// Pages that it shares from time to time.
const POOL: u64 = DATA + 0x1_0000;
const POOL_PAGES: u64 = 2;
/// By which register it tells what it has heard.
const HEARD: u16 = device_base(1);

/// A guest that keeps a secret on a page, says forever whether it is still there, and converts others.
fn witness(a: &mut Assembler) -> Result<(), IcedError> {
    a.store(DATA, Side::Private, SECRET)?;
    a.store(DATA + PAGE_SIZE - 4, Side::Private, SECRET)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.load(DATA, Side::Private)?;
    a.report()?;
    a.load(DATA + PAGE_SIZE - 4, Side::Private)?;
    a.report()?;
    a.listen(HEARD)?;
    a.ring(HEARD)?;
    for to in [Side::Shared, Side::Private] {
        a.convert(POOL, POOL_PAGES, to)?;
        a.ring(HEARD)?;
    }
    a.jmp(again)
}

/// A guest that does nothing forever.
fn spin(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.jmp(again)
}

const SAYS_SECRET: Exit = Exit::DoorbellWrite { register: REPORT, value: SECRET };

fn says(value: u32) -> Exit {
    Exit::DoorbellWrite { register: HEARD, value }
}

fn pool() -> GpaRange {
    range(POOL, POOL_PAGES)
}

// Orders

#[test]
fn orders_before_or_after_their_time_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let load = Order::Load { range: range(DATA, 1), kind: PageKind::Measured };
    let slot = Order::Slot(range(0, MEMORY / PAGE_SIZE));
    let accept = Order::Accept { trigger: Trigger::Edge, vectors: [0; 4], most_per_second: None };

    let mut vault = Vault::start();
    for early in [&load, &Loading::state(0), &Order::Seal, &Order::Count] {
        vault.refused(early);
    }
    vault.refused(&Order::Accept { trigger: Trigger::Edge, vectors: [1 << 14, 0, 0, 0], most_per_second: None });
    // There is no memory yet; and there is no second try.
    vault.refused(&create(1));
    for late in [&slot, &accept, &create(1), &load, &Order::Seal, &Order::Count] {
        vault.refused(late);
    }

    let mut loading = Loading::start(1);
    for wrong in [&slot, &accept, &create(1), &Order::Count] {
        loading.vault.refused(wrong);
    }
    loading.load_all(witness);
    let (mut guest, _) = loading.seal();
    for late in [&slot, &accept, &create(1), &load, &Loading::state(0), &Order::Seal] {
        guest.vault.refused(late);
    }
    assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { shared: 0, .. }));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

#[test]
fn orders_that_repeat_or_jump_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    let accept = Order::Accept { trigger: Trigger::Edge, vectors: [0; 4], most_per_second: None };
    vault.done(&accept);
    for sequence in [1, 0, u32::MAX, 5, 5, 4] {
        vault.send(&Vault::packet(&accept, sequence), &[]);
        assert!(matches!(vault.hear(), Heard::Report(Report::Failed(_), _)), "{sequence}");
    }
    vault.sequence = 4;
    vault.done(&accept);
}

#[test]
fn packets_that_are_no_orders_are_refused_or_end_the_vault() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    for (sequence, kind) in (1..).zip([0, 1, 0x11, 0x30, 0x1ff, 0x201, 0xffff]) {
        vault.send(Message { sequence, kind, ..Message::default() }.as_bytes(), &[]);
        assert!(matches!(vault.hear(), Heard::Report(Report::Failed(_), _)), "kind {kind:#x}");
    }
    let packet = Vault::packet(&Order::Count, 1);
    let lying = Message { sequence: 1, kind: 0x107, text: 9, ..Message::default() };
    for (what, packet) in [
        ("empty", vec![]),
        ("short", packet[..55].to_vec()),
        ("one byte", vec![0]),
        ("with bytes that it does not declare", [&packet[..], b"x"].concat()),
        ("without the text that it declares", lying.as_bytes().to_vec()),
        ("long", [&packet[..], &[b'x'; 257]].concat()),
        ("huge", vec![0; 100_000]),
    ] {
        let mut vault = Vault::start();
        vault.send(&packet, &[]);
        assert!(matches!(vault.hear(), Heard::Gone), "{what}");
        vault.end(PATIENCE);
    }
    // That somebody else's vault has ended is no matter of this one.
    vault.sequence = 7;
    vault.done(&Order::Slot(range(0, 1)));
}

#[test]
fn descriptors_that_do_not_belong_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    let null = File::open("/dev/null").unwrap();
    let before = fs::read_dir(format!("/proc/{}/fd", vault.process.id())).map(Iterator::count).ok();
    for _ in 0..4 {
        let heard = vault.order_with(&Order::Slot(range(0, 1)), &[null.as_fd()]);
        assert!(matches!(heard, Heard::Report(Report::Failed(_), _)), "{heard:?}");
    }
    let after = fs::read_dir(format!("/proc/{}/fd", vault.process.id())).map(Iterator::count).ok();
    assert_eq!(after, before, "it has kept what it refused");
}

#[test]
fn a_launch_begins_with_two_files_of_fixed_and_right_sizes_and_nothing_else() {
    let Some(_vaults) = vaults() else { return };
    let (good, good_pages) = (sealed_file(MEMORY), sealed_file(PAGE_SIZE));
    let (small, large) = (sealed_file(MEMORY - PAGE_SIZE), sealed_file(MEMORY + PAGE_SIZE));
    let (unsealed, can_grow) = (file(MEMORY), file(MEMORY));
    fcntl_add_seals(&can_grow, SealFlags::SHRINK).unwrap();
    let unsealed_pages = file(PAGE_SIZE);
    let null = File::open("/dev/null").unwrap();
    let root = File::open("/").unwrap();
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(MEMORY).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let shared: [(&str, BorrowedFd<'_>); 8] = [
        ("too small", small.as_fd()),
        ("too large", large.as_fd()),
        ("unsealed", unsealed.as_fd()),
        ("can grow", can_grow.as_fd()),
        ("a device", null.as_fd()),
        ("a directory", root.as_fd()),
        ("a file on a disk", on_disk.as_fd()),
        ("an eventfd", event.as_fd()),
    ];
    let (good, good_pages) = (good.as_fd(), good_pages.as_fd());
    let mut cases: Vec<_> = shared.map(|(what, shared)| (what, vec![shared, good_pages])).into();
    cases.extend([
        ("no pages", vec![good]),
        ("nothing", vec![]),
        ("the wrong way round", vec![good_pages, good]),
        ("pages unsealed", vec![good, unsealed_pages.as_fd()]),
        ("pages of another size", vec![good, good]),
        ("too many", vec![good, good_pages, good, good]),
    ]);
    for (what, descriptors) in cases {
        let mut vault = Vault::start();
        vault.done(&Order::Slot(range(0, MEMORY / PAGE_SIZE)));
        let heard = vault.order_with(&create(1), &descriptors);
        assert!(matches!(heard, Heard::Report(Report::Failed(_), _) | Heard::Gone), "{what}: {heard:?}");
    }
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let create_with = |slots: &[GpaRange], order: &Order| {
        let mut vault = Vault::start();
        slots.iter().for_each(|slot| vault.done(&Order::Slot(*slot)));
        let bytes = slots.iter().map(GpaRange::len).sum();
        let Order::Create { vcpus, .. } = order else { panic!("{order:?}") };
        let (shared, pages) = (sealed_file(bytes), sealed_file(u64::from((*vcpus).min(9)) * PAGE_SIZE));
        match vault.order_with(order, &[shared.as_fd(), pages.as_fd()]) {
            Heard::Report(Report::Failed(reason), _) => reason,
            heard => panic!("{order:?} with {slots:?}: {heard:?}"),
        }
    };
    let all = [range(0, MEMORY / PAGE_SIZE)];
    create_with(&[range(0, 16), range(0x8000, 16)], &create(1));
    create_with(&[range(0, 16), range(0, 16)], &create(1));
    create_with(&[range(1 << 51, 16)], &create(1));
    for vcpus in [0, 1025, u32::MAX] {
        create_with(&all, &create(vcpus));
    }
    for bit in [5, 17, 63] {
        let policy = Policy::from_bits_retain(1 << bit);
        let demanding = Order::Create {
            vcpus: 1,
            policy,
            doorbell: Doorbell::Port,
            transport: Transport::Doorbell,
            interrupt_controller: InterruptController::None,
        };
        let reason = create_with(&all, &demanding);
        assert!(reason.contains("policy"), "{reason}");
    }

    let mut vault = Vault::start();
    let slots = (0u64..).map(|slot| Order::Slot(range(2 * slot * PAGE_SIZE, 1)));
    let (most, too_many) = slots
        .enumerate()
        .map(|(count, slot)| (count, vault.order(&slot)))
        .find(|(_, report)| *report != Report::Done)
        .unwrap();
    assert_eq!(most, cvm_core::boot::MAX_RANGES);
    assert!(matches!(too_many, Report::Failed(_)), "{too_many:?}");
}

#[test]
fn what_is_refused_while_loading_is_neither_loaded_nor_measured() {
    let Some(vaults) = vaults() else { return };
    let honest = load(&vaults.platform, config(1), witness).seal().unwrap().transcript().measurement();

    let mut loading = Loading::start(1);
    let code = assemble(&config(1), CODE, witness);
    loading.load(CODE, &code);
    loading.shared.write_all_at(&[0xcc; 64], CODE).unwrap();
    let measured = |start, pages| Order::Load { range: range(start, pages), kind: PageKind::Measured };
    for (what, order) in [
        ("outside memory", measured(MEMORY, 1)),
        ("partly outside", measured(MEMORY - PAGE_SIZE, 2)),
        ("far outside", measured(1 << 40, 1)),
        ("twice", measured(CODE, 1)),
        ("partly twice", measured(CODE - PAGE_SIZE, 2)),
        ("twice, zero", Order::Load { range: range(CODE, 1), kind: PageKind::Zero }),
        ("too much", measured(0, 513)),
        ("zero outside", Order::Load { range: range(MEMORY, 1), kind: PageKind::Zero }),
        ("no such vcpu", Loading::state(1)),
    ] {
        let reason = loading.vault.refused(&order);
        assert!(!reason.is_empty(), "{what}");
    }
    // As the honest launch goes on.
    loading.load(TABLES, &identity_map(Gpa(TABLES), MEMORY, None).unwrap());
    loading.vault.done(&Loading::state(0));
    loading.vault.refused(&Loading::state(0));
    loading.load(BOOT_PAGE, &honest_boot_page());
    let (mut guest, measurement) = loading.seal();
    assert_eq!(measurement, honest);
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

/// The boot page of `load`.
fn honest_boot_page() -> Vec<u8> {
    let config = config(1);
    let mut page = cvm_core::boot::BootPage {
        magic: cvm_core::boot::MAGIC,
        vcpus: 1,
        doorbell: config.doorbell as u32,
        transport: Transport::Doorbell as u32,
        accepted: cvm_core::boot::ALL_ACCEPTED,
        ..zerocopy::FromZeros::new_zeroed()
    };
    page.memory[0].len = MEMORY;
    page.as_bytes().to_vec()
}

#[test]
fn a_vm_whose_vcpus_have_no_state_is_not_sealed() {
    let Some(_vaults) = vaults() else { return };
    let mut loading = Loading::start(2);
    loading.vault.done(&Loading::state(1));
    loading.vault.refused(&Order::Seal);
    loading.vault.refused(&Loading::state(0));
    loading.vault.refused(&Order::Seal);
}

#[test]
fn a_vmm_that_never_fetches_its_reports_stops_nobody_but_itself() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    for sequence in 1..100_000 {
        let packet = Vault::packet(&Order::Count, sequence);
        let empty = &mut SendAncillaryBuffer::default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(vault.socket(), &[IoSlice::new(&packet)], empty, flags) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    vault.end(PATIENCE);
}

// Requests

#[test]
fn nothing_is_converted_but_what_the_guest_has_asked_for_and_as_long_as_it_waits() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(2, witness);
    let convert = |range, to| Request::Convert { range, to };
    let secret = convert(range(DATA, 1), Side::Shared);
    guest.refused(&secret);
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    guest.refused(&secret);
    guest.refused(&Request::Run(Given::Answer(Answer::Done)));
    guest.refused(&Request::Run(Given::Value(1)));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);

    // It reads: it takes a value and nothing else.
    assert_eq!(guest.run(Given::Nothing), Exit::DoorbellRead { register: HEARD });
    guest.refused(&Request::Run(Given::Nothing));
    for answer in [Answer::Done, Answer::Invalid, Answer::Retry] {
        guest.refused(&Request::Run(Given::Answer(answer)));
    }
    guest.refused(&secret);
    assert_eq!(guest.run(Given::Value(0xffff_ffff_0000_0007)), says(7));

    // It asks: it takes what is true.
    for to in [Side::Shared, Side::Private] {
        assert!(matches!(guest.run(Given::Nothing), Exit::Conversion(request) if request.gpa() == Gpa(POOL)));
        guest.refused(&Request::Run(Given::Nothing));
        guest.refused(&Request::Run(Given::Value(0)));
        guest.refused(&Request::Run(Given::Answer(Answer::Done)));
        for wrong in [
            secret.clone(),
            convert(pool(), to.other()),
            convert(range(POOL, POOL_PAGES + 1), to),
            convert(range(POOL - PAGE_SIZE, 2), to),
            convert(range(0, MEMORY / PAGE_SIZE), to),
            convert(range(MEMORY, 1), to),
            Request::Poison(pool()),
            Request::Poison(range(DATA, 1)),
            Request::Poison(range(MEMORY, 1)),
        ] {
            guest.refused(&wrong);
        }
        let other = guest.ask(1, &convert(pool(), to));
        assert!(matches!(other, Reply::Refused(_)), "on another's behalf: {other:?}");
        assert_eq!(guest.ask(FIRST, &convert(range(POOL, 1), to)), Reply::Done);
        guest.refused(&Request::Run(Given::Answer(Answer::Done)));
        assert_eq!(guest.ask(FIRST, &convert(pool(), to)), Reply::Done);
        assert_eq!(guest.run(Given::Answer(Answer::Done)), says(Answer::Done as u32));
        guest.refused(&convert(pool(), to));
        guest.refused(&convert(pool(), to.other()));
    }
    // What is refused cannot be carried out afterwards.
    for answer in [Answer::Retry, Answer::Invalid] {
        while !matches!(guest.run(Given::Nothing), Exit::DoorbellRead { .. }) {}
        assert_eq!(guest.run(Given::Value(1)), says(1));
        for to in [Side::Shared, Side::Private] {
            assert!(matches!(guest.run(Given::Nothing), Exit::Conversion(_)));
            assert_eq!(guest.run(Given::Answer(answer)), says(answer as u32));
            guest.refused(&convert(pool(), to));
            guest.refused(&Request::Run(Given::Answer(Answer::Done)));
        }
    }
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    let (mut page, nothing) = ([0xff; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
    guest.shared.read_exact_at(&mut page, DATA).unwrap();
    assert_eq!(page, nothing, "the secret's page has never been shared");
}

#[test]
fn registers_show_what_the_exit_exposes_and_nothing_else() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let mut exposed = || {
        let registers =
            Register::ALL.into_iter().map(|register| match guest.ask(FIRST, &Request::Register(register)) {
                Reply::Register(value) => (register, value),
                reply => panic!("{register:?}: {reply:?}"),
            });
        let exposed: Vec<_> = registers.filter_map(|(register, value)| Some((register, value?))).collect();
        (exposed, guest.run(Given::Nothing))
    };
    let port = |register: u16| (Register::Rdx, u64::from(PORT_BASE + register));
    assert_eq!(exposed(), (vec![], SAYS_SECRET));
    let write = vec![(Register::Rax, SECRET.into()), port(REPORT)];
    assert_eq!(exposed(), (write.clone(), SAYS_SECRET));
    assert_eq!(exposed(), (write, Exit::DoorbellRead { register: HEARD }));
    let registers = Register::ALL.map(|register| (register, guest.ask(FIRST, &Request::Register(register))));
    for (register, reply) in registers {
        let expected = if register == Register::Rdx { Some(port(HEARD).1) } else { None };
        assert_eq!(reply, Reply::Register(expected), "{register:?}");
    }
}

#[test]
fn nothing_is_injected_that_the_guest_does_not_accept() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    for vector in 0..=255 {
        let refusal = if vector < 32 { Refusal::Reserved } else { Refusal::NotAccepted };
        let reply = guest.ask(FIRST, &Request::Inject(Event::Interrupt(vector)));
        assert_eq!(reply, Reply::InjectionRefused(refusal), "{vector:#x}");
    }
    for event in [Event::Nmi, Event::Smi, Event::Init, Event::Startup, Event::Exception(13), Event::Exception(0x41)] {
        let reply = guest.ask(FIRST, &Request::Inject(event));
        assert_eq!(reply, Reply::InjectionRefused(Refusal::NotAnInterrupt), "{event}");
    }
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

#[test]
fn requests_whose_numbers_jump_or_disagree_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let (run, _) = Request::Run(Given::Nothing).encode();
    for (sequence, within) in [(2, 2), (1, 1), (u32::MAX, u32::MAX), (5, 5), (6, 5), (7, 8), (1 << 31, 1 << 31)] {
        guest.post(FIRST, sequence, &Message { sequence: within, ..run }, &[]);
        let reply = guest.hear(FIRST, sequence);
        assert!(matches!(reply, Some(Reply::Refused(_))), "{sequence}: {reply:?}");
    }
    guest.last[0] = 0;
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    // A text is none of its business.
    let sequence = guest.next(FIRST);
    guest.post(FIRST, sequence, &Message { sequence, text: 1, ..run }, b"x");
    assert!(matches!(guest.hear(FIRST, sequence), Some(Reply::Refused(_))));
    let sequence = guest.next(FIRST);
    guest.post(FIRST, sequence, &Message { sequence, text: u16::MAX, ..run }, b"x");
    assert!(matches!(guest.hear(FIRST, sequence), Some(Reply::Refused(_))));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

/// Numbers without a pattern, the same each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes()).flatten().take(len).collect()
    }

    fn of(&mut self, choices: &[u64]) -> u64 {
        choices[self.next() as usize % choices.len()]
    }

    /// A message that is a request in form, or almost.
    fn message(&mut self) -> Message {
        let any = self.next() >> (self.next() % 64);
        let address = self.of(&[POOL, POOL, POOL + PAGE_SIZE, DATA, 0, 1 << 52, any]);
        let len = self.of(&[PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 0, any]);
        let small = self.next() % 4;
        let (kind, operands) = match self.next() % 20 {
            0..5 => (1, [0; 3]),
            5..7 => (2, [any, 0, 0]),
            7 => (3, [small, 0, 0]),
            8..15 => (4, [address, len, self.next() % 2]),
            15 => (5, [address, len, 0]),
            16 => (6, [any % 32, 0, 0]),
            17 => (7, [small * 2, any % 512, 0]),
            18 => (small as u16 + 4, [address, any, small]),
            _ => (any as u16, [any, small, any]),
        };
        let mut message = Message { kind, ..Message::default() };
        message.operands[..3].copy_from_slice(&operands);
        match self.next() % 32 {
            0 => message.text = any as u16,
            1 => message.operands[3..].fill(any),
            _ => {}
        }
        message
    }
}

#[test]
fn garbage_on_its_page_does_not_touch_a_guest() {
    const ROUNDS: u32 = 2000;
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let mut kinds = [0; 4];
    for seed in [1, 0x0123_4567_89ab_cdef] {
        let mut noise = Noise(seed);
        for round in 0..ROUNDS / 2 {
            if noise.next().is_multiple_of(2) {
                guest.fill(FIRST, at::REQUEST_MESSAGE, &noise.bytes(at::REPLY - at::REQUEST_MESSAGE));
                guest.fill(FIRST, at::REPLY + 4, &noise.bytes(PAGE_SIZE as usize - at::REPLY - 4));
            }
            if noise.next().is_multiple_of(8) {
                guest.word(FIRST, at::KICK).store(noise.next() as u32, Ordering::SeqCst);
                rustix::io::write(&guest.kicks, &(1 + noise.next() % 2).to_ne_bytes()).unwrap();
            }
            let mut sequence = guest.next(FIRST);
            let mut message = noise.message();
            message.sequence = sequence;
            guest.post(FIRST, sequence, &message, &[]);
            if noise.next().is_multiple_of(4) {
                // While it is being looked at, or the guest runs.
                for _ in 0..4 {
                    guest.fill(FIRST, at::REQUEST_MESSAGE, &noise.bytes(at::REPLY - at::REQUEST_MESSAGE));
                    guest.fill(FIRST, at::REPLY_MESSAGE, &noise.bytes(PAGE_SIZE as usize - at::REPLY_MESSAGE));
                }
                sequence = noise.next() as u32 & !(1 << 31);
                guest.ring(FIRST, sequence);
                guest.last[0] = sequence;
                // What it says may be garbage of this test by now.
                let begin = Instant::now();
                while guest.word(FIRST, at::REPLY).load(Ordering::SeqCst) != sequence {
                    assert!(begin.elapsed() < PATIENCE, "round {round}: the vault does not reply");
                    thread::yield_now();
                }
                continue;
            }
            let reply = guest.hear(FIRST, sequence).expect("the vault has ended");
            let request = Request::decode(&message, &[]);
            match (&request, &reply) {
                (_, Reply::Refused(_)) => kinds[0] += 1,
                (Ok(Request::Run(_)), Reply::Exit(exit)) => {
                    kinds[1] += 1;
                    let is_report = matches!(exit, Exit::DoorbellWrite { register: REPORT, .. });
                    assert!(!is_report || *exit == SAYS_SECRET, "round {round}: {exit:?}");
                }
                (Ok(Request::Convert { range, .. }), Reply::Done) => {
                    kinds[2] += 1;
                    assert!(pool().contains_range(range), "round {round}: {request:?}");
                }
                (Ok(Request::Register(_)), Reply::Register(_)) => kinds[3] += 1,
                (Ok(Request::Inject(_)), Reply::InjectionRefused(_)) => {}
                _ => panic!("round {round}: {request:?} with {reply:?}"),
            }
        }
    }
    assert!(kinds.iter().all(|count| *count > 0), "the noise tries everything: {kinds:?}");
    // Back to what is honest, wherever it has stopped.
    let mut given = [Given::Nothing, Given::Answer(Answer::Invalid), Given::Value(0)].into_iter();
    let first = given.find_map(|given| match guest.ask(FIRST, &Request::Run(given)) {
        Reply::Exit(exit) => Some(exit),
        Reply::Refused(_) => None,
        reply => panic!("{reply:?}"),
    });
    let mut exit = first.expect("it cannot go on");
    let mut reports = 0;
    while reports < 4 {
        let given = match exit {
            SAYS_SECRET => {
                reports += 1;
                Given::Nothing
            }
            Exit::DoorbellRead { .. } => Given::Value(0),
            Exit::Conversion(request) => {
                let convert = Request::Convert { range: pool(), to: request.to() };
                assert_eq!(guest.ask(FIRST, &convert), Reply::Done);
                Given::Answer(Answer::Done)
            }
            Exit::DoorbellWrite { register: HEARD, .. } | Exit::Kicked => Given::Nothing,
            other => panic!("{other:?}"),
        };
        exit = guest.run(given);
    }
}

#[test]
fn a_vault_gives_up_on_a_vmm_that_makes_no_sense() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let begin = Instant::now();
    for sequence in (2..).step_by(2) {
        guest.ring(FIRST, sequence & !(1 << 31));
        if guest.hear(FIRST, sequence & !(1 << 31)).is_none() {
            break;
        }
        if begin.elapsed() > LIMIT / 6 {
            return skip("its patience is too long for this machine");
        }
    }
    assert_eq!(guest.vault.end(PATIENCE).code(), Some(2));
}

#[test]
fn a_vault_ends_with_its_vmm_even_while_the_guest_spins() {
    let Some(_vaults) = vaults() else { return };
    for spinning in [false, true] {
        let mut guest = Hostage::start(1, spin);
        if spinning {
            let sequence = guest.next(FIRST);
            let (message, _) = Request::Run(Given::Nothing).encode();
            guest.post(FIRST, sequence, &Message { sequence, ..message }, &[]);
            thread::sleep(Duration::from_millis(50));
        }
        guest.vault.socket = None;
        guest.vault.end(Duration::from_secs(2));
    }
    let mut vault = Vault::start();
    vault.socket = None;
    vault.end(Duration::from_secs(2));
}

#[test]
fn a_vmm_that_takes_kicks_back_does_not_keep_the_vault_waiting_for_them() {
    let Some(_vaults) = vaults() else { return };
    const ROUNDS: u32 = 5000;
    let mut guest = Hostage::start(1, spin);
    // Both ends of an eventfd are one, with the same flags.
    fcntl_setfl(&guest.kicks, OFlags::empty()).unwrap();
    let kicks = guest.kicks.try_clone().unwrap();
    let round = Arc::new(AtomicU32::new(0));
    let now = Arc::clone(&round);
    let thief = thread::spawn(move || {
        for next in 1..=ROUNDS {
            while now.load(Ordering::SeqCst) < next {
                std::hint::spin_loop();
            }
            // The vault has not woken up yet, or has taken it, or is about to and finds nothing.
            (0..next % 500).for_each(|_| std::hint::spin_loop());
            let _ = preadv2(&kicks, &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT);
        }
    });
    for next in 1..=ROUNDS {
        round.store(next, Ordering::SeqCst);
        rustix::io::write(&guest.kicks, &1u64.to_ne_bytes()).unwrap();
        thread::sleep(Duration::from_micros(20));
        assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { .. }));
    }
    thief.join().unwrap();
    guest.vault.socket = None;
    guest.vault.end(Duration::from_secs(2));
}

// What it has given up

#[test]
fn a_vault_has_nothing_but_what_it_needs() {
    let Some(vaults) = vaults() else { return };
    // What other code of a VMM may have forgotten to protect.
    let inherited = File::open("/dev/zero").unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    let mut guest = Guest::from_launch(load(&vaults.platform, config(2), witness));
    fcntl_setfd(&inherited, FdFlags::CLOEXEC).unwrap();
    assert_eq!(guest.run(), SAYS_SECRET);
    let [vault] = children()[..] else { panic!("one vault") };
    let proc = |file: &str| format!("/proc/{}/{file}", vault.as_raw_nonzero());
    let read = |file: &str| fs::read_to_string(proc(file)).unwrap();

    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}")).trim()
    };
    assert_eq!((field("Name"), field("NoNewPrivs"), field("Seccomp")), ("cvm-vault", "1", "2"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(
        read("limits").lines().find(|line| line.starts_with("Max core file size")).map(|line| line
            .split_whitespace()
            .skip(4)
            .take(2)
            .collect()),
        Some(vec!["0", "0"])
    );
    if !rustix::process::geteuid().is_root() {
        assert!(fs::read_dir(proc("fd")).is_err() && fs::read(proc("environ")).is_err(), "its user can look into it");
        return skip("the rest is not to be seen but by root");
    }
    assert_eq!(field("CapBnd"), "0000000000000000");
    // The loader's paths are for it to start at all.
    let environment = read("environ");
    let environment: Vec<_> =
        environment.split_terminator('\0').filter(|entry| !entry.starts_with("LD_LIBRARY_PATH=")).collect();
    assert_eq!(environment, ["CVM_IS_VAULT=1"]);
    assert_eq!(fs::read_link(proc("cwd")).unwrap(), Path::new("/"));
    let descriptors = fs::read_dir(proc("fd")).unwrap();
    let descriptors = descriptors.map(|entry| fs::read_link(entry.unwrap().path()).unwrap().into_os_string());
    let mut descriptors: Vec<_> = descriptors.map(|target| target.into_string().unwrap()).collect();
    descriptors.sort();
    let allowed = ["/dev/kvm", "/memfd:cvm-", "anon_inode:[eventfd]", "anon_inode:kvm-v", "socket:["];
    for target in &descriptors {
        let is_allowed = allowed.iter().any(|prefix| target.starts_with(prefix)) || target.contains("[kvm-gmem]");
        assert!(is_allowed, "{target} in {descriptors:?}");
    }
    let count = |prefix: &str| descriptors.iter().filter(|target| target.starts_with(prefix)).count();
    let counts =
        ["/dev/kvm", "socket:[", "anon_inode:[eventfd]", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu"].map(count);
    assert_eq!(counts, [1, 1, 1, 1, 2], "{descriptors:?}");
}

// Dying

/// How long anybody may take to notice.
const NOTICE: Duration = Duration::from_secs(5);

fn assert_dead<T>(outcome: Result<T, Error>, what: &str) {
    let Err(error) = outcome else { panic!("{what} goes on without a vault") };
    assert_says_dead(&error, what);
}

/// That an error, or what led to it, is the death of the vault.
fn assert_says_dead(error: &(dyn std::error::Error + 'static), what: &str) {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    let died = |error: &(dyn std::error::Error + 'static)| {
        matches!(error.downcast_ref(), Some(KvmError::VaultDied { .. })) && error.to_string().contains("vault is dead")
    };
    assert!(chain.any(died), "{what}: {error}: {:?}", error.source().map(ToString::to_string));
}

/// Kills the vault, the only child of this process.
fn kill_vault() {
    let [vault] = children()[..] else { panic!("one vault") };
    kill_process(vault, Signal::KILL).unwrap();
}

fn in_time<T>(what: &str, step: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let outcome = step();
    assert!(begin.elapsed() < NOTICE, "{what} took {:?}", begin.elapsed());
    outcome
}

/// That all that can be asked of a VM says that its vault is dead.
fn assert_all_dead(guest: &mut Guest) {
    for vcpu in &mut guest.vcpus {
        in_time("inject", || assert_dead(vcpu.inject(Event::Interrupt(0x41)), "inject"));
        in_time("register", || assert_dead(vcpu.register(Register::Rax), "register"));
    }
    in_time("allocated", || assert_dead(guest.vm.allocated(), "allocated"));
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// That a VM leaves nothing of its vault when it goes.
fn assert_leaves_nothing(guest: Guest, files_before: usize) {
    in_time("drop", || drop(guest));
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files_before);
}

#[test]
fn every_vcpu_hears_that_the_vault_dies_while_they_spin() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut guest = Guest::from_launch(load(&vaults.platform, config(2), spin));
    thread::scope(|scope| {
        let vcpus: Vec<_> = guest.vcpus.iter_mut().map(|vcpu| scope.spawn(|| vcpu.run())).collect();
        thread::sleep(Duration::from_millis(200));
        assert!(vcpus.iter().all(|vcpu| !vcpu.is_finished()), "they spin");
        kill_vault();
        in_time("run", || {
            vcpus.into_iter().for_each(|vcpu| assert_dead(vcpu.join().unwrap(), "run"));
        });
    });
    assert!(!guest.is_overdue());
    assert_all_dead(&mut guest);
    for vcpu in &mut guest.vcpus {
        assert!(matches!(vcpu.run(), Err(Error::Protocol { .. })), "it has failed");
    }
    assert_leaves_nothing(guest, files);
}

#[test]
fn a_vault_that_dies_between_exits_is_noticed_by_whatever_comes_next() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let next: [fn(&mut Guest); 3] = [
        |guest| assert_dead(guest.vcpus[0].run(), "run"),
        |guest| assert_dead(guest.vcpus[0].register(Register::Rax), "register"),
        |guest| assert_dead(guest.vm.allocated(), "allocated"),
    ];
    for next in next {
        let mut guest = Guest::from_launch(load(&vaults.platform, config(2), witness));
        assert_eq!(guest.run(), SAYS_SECRET);
        kill_vault();
        in_time("what comes next", || next(&mut guest));
        assert_all_dead(&mut guest);
        in_time("run", || assert_dead(guest.vcpus[1].run(), "run"));
        assert_leaves_nothing(guest, files);
    }
}

#[test]
fn a_vault_that_dies_while_a_guest_waits_for_an_answer_converts_nothing() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut guest =
        Guest::from_launch(load(&vaults.platform, config(1), |a| a.convert(POOL, POOL_PAGES, Side::Shared)));
    let Exit::Conversion(request) = guest.run() else { panic!("no conversion") };
    kill_vault();
    let conversion = in_time("convert", || guest.vm.convert(&request));
    assert_eq!(conversion.answer(), Answer::Invalid);
    assert_says_dead(conversion.cause().unwrap(), "convert");
    guest.vcpus[0].answer_conversion(conversion).unwrap();
    in_time("run", || assert_dead(guest.vcpus[0].run(), "run"));
    assert_all_dead(&mut guest);
    assert_leaves_nothing(guest, files);
}

#[test]
fn a_vault_that_dies_while_it_is_loaded_ends_the_launch() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut launch = vaults.platform.launch(config(1)).unwrap();
    kill_vault();
    assert_dead(in_time("load", || launch.load(Gpa(CODE), &[0xf4], PageKind::Measured)), "load");
    in_time("drop", || drop(launch));
    let launch = load(&vaults.platform, config(1), witness);
    kill_vault();
    let sealed = in_time("seal", || launch.seal().map(drop));
    assert_dead(sealed, "seal");
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

/// Names the program that a test is to take for a vault: it is run anew for each.
const PROGRAM: &str = "CVM_TEST_PROGRAM";

#[test]
fn a_program_that_is_no_vault_is_told_from_one() {
    if let Some(program) = std::env::var_os(PROGRAM) {
        cvm_backend_kvm::vault::use_program(program);
        let platform = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::Vault)).unwrap();
        let error = platform.launch(config(1)).unwrap_err();
        let chain = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        println!("it says: {}", chain.map(ToString::to_string).collect::<Vec<_>>().join(": "));
        assert!(children().is_empty(), "{:?}", children());
        return;
    }
    let Some(_vaults) = vaults() else { return };
    let directory = tempfile::tempdir().unwrap();
    let silent = directory.path().join("silent");
    fs::write(&silent, "#!/bin/sh\nexec <&-\nexec sleep 1000\n").unwrap();
    fs::set_permissions(&silent, Permissions::from_mode(0o755)).unwrap();
    for (program, says) in [
        (silent.to_str().unwrap(), "the vault is dead"),
        ("/bin/true", "the vault is dead: exit status: 0"),
        ("/bin/false", "the vault is dead: exit status: 1"),
        ("/bin/cat", "the vault is dead"),
        ("/nonexistent", "the vault failed to start its process"),
        ("/etc/passwd", "the vault failed to start its process"),
    ] {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "a_program_that_is_no_vault_is_told_from_one", "--nocapture"]).env(PROGRAM, program);
        let output = again.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains(says), "{program}: {printed}");
    }
}
