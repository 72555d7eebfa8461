//! A VMM that starts the vault's program itself, and says to it whatever it likes.

use crate::PATIENCE;
use crate::common::{Assembler, BOOT_PAGE, CODE, MEMORY, TABLES, assemble, config, range};
use cvm_backend_kvm::vault::protocol::{Given, Message, Order, Reply, Report, Request};
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::interrupt::InterruptController;
use cvm_core::x86::{VcpuState, identity_map};
use cvm_core::{Exit, Gpa, Measurement, PAGE_SIZE, PageKind, Policy};
use iced_x86::IcedError;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::thread::futex;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use zerocopy::{FromBytes, IntoBytes};

/// What a packet was answered with.
#[derive(Debug)]
pub enum Heard {
    Report(Report),
    /// The vault has closed its socket.
    Gone,
}

/// A vault, and the other end of its socket.
pub struct Vault {
    pub process: Child,
    pub socket: Option<OwnedFd>,
    pub sequence: u32,
}

impl Vault {
    pub fn start() -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        set_socket_timeout(&ours, Timeout::Recv, Some(PATIENCE)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvm-vault"));
        command.arg0("cvm-vault").arg("/dev/kvm").env_clear().env("CVM_IS_VAULT", "1");
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        let vault = Self { process: command.spawn().unwrap(), socket: Some(ours), sequence: 0 };
        // What is left of the command has the vault's end of the socket.
        drop(command);
        assert!(matches!(vault.hear(), Heard::Report(Report::Done)));
        vault
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().unwrap().as_fd()
    }

    pub fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(descriptors.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        sendmsg(self.socket(), &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next report, which has to come in time.
    pub fn hear(&self) -> Heard {
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
        assert_eq!(descriptors.flatten().count(), 0, "no descriptor crosses from a vault to its VMM");
        let (message, text) = Message::read_from_prefix(&bytes[..len]).unwrap();
        Heard::Report(Report::decode(&message, text).unwrap())
    }

    /// An order as a packet with this sequence number.
    pub fn packet(order: &Order, sequence: u32) -> Vec<u8> {
        let (message, text) = order.encode();
        [Message { sequence, ..message }.as_bytes(), text.as_bytes()].concat()
    }

    pub fn order_with(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Heard {
        self.sequence = self.sequence.wrapping_add(1);
        self.send(&Self::packet(order, self.sequence), descriptors);
        self.hear()
    }

    pub fn order(&mut self, order: &Order) -> Report {
        match self.order_with(order, &[]) {
            Heard::Report(report) => report,
            Heard::Gone => panic!("{order:?} has ended the vault"),
        }
    }

    #[track_caller]
    pub fn done(&mut self, order: &Order) {
        assert_eq!(self.order(order), Report::Done, "{order:?}");
    }

    /// The vault's reason to refuse an order.
    #[track_caller]
    pub fn refused(&mut self, order: &Order) -> String {
        match self.order(order) {
            Report::Failed(reason) => reason,
            report => panic!("{order:?}: {report:?}"),
        }
    }

    /// How it ends, in time.
    pub fn end(&mut self, limit: Duration) -> ExitStatus {
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

pub fn file(bytes: u64) -> File {
    let file = memfd_create("cvm-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    file.into()
}

pub fn sealed_file(bytes: u64) -> File {
    let file = file(bytes);
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    file
}

/// Both ends of a socket for kicks, of which the vault gets the second.
pub fn kick_sockets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

pub fn create(vcpus: u32) -> Order {
    Order::Create {
        vcpus,
        policy: Policy::empty(),
        doorbell: Doorbell::Port,
        transport: Transport::Doorbell,
        interrupt_controller: InterruptController::None,
    }
}

/// A VM that is being loaded.
pub struct Loading {
    pub vault: Vault,
    pub shared: File,
    pub pages: File,
    pub kicks: OwnedFd,
    pub vcpus: u32,
}

impl Loading {
    pub fn start(vcpus: u32) -> Self {
        let mut vault = Vault::start();
        vault.done(&Order::Slot(range(0, MEMORY / PAGE_SIZE)));
        let (shared, pages) = (sealed_file(MEMORY), sealed_file(u64::from(vcpus) * PAGE_SIZE));
        let (kicks, theirs) = kick_sockets();
        let created = vault.order_with(&create(vcpus), &[shared.as_fd(), pages.as_fd(), theirs.as_fd()]);
        assert!(matches!(created, Heard::Report(Report::Done)), "{created:?}");
        Self { vault, shared, pages, kicks, vcpus }
    }

    pub fn load(&mut self, gpa: u64, contents: &[u8]) {
        self.shared.write_all_at(contents, gpa).unwrap();
        let pages = (contents.len() as u64).div_ceil(PAGE_SIZE);
        self.vault.done(&Order::Load { range: range(gpa, pages), kind: PageKind::Measured });
    }

    /// The order that gives a vCPU the state whose parts were told.
    pub fn state(index: u32) -> Order {
        Order::SetVcpu { index }
    }

    pub fn give_state(&mut self, index: u32) {
        let state = VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), index, Gpa(BOOT_PAGE));
        Order::set_vcpu(index, &state).for_each(|order| self.vault.done(&order));
    }

    pub fn load_all(&mut self, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) {
        self.load(CODE, &assemble(&config(self.vcpus), CODE, write));
        self.load(TABLES, &identity_map(Gpa(TABLES), MEMORY, None).unwrap());
        (0..self.vcpus).for_each(|index| self.give_state(index));
    }

    pub fn seal(mut self) -> (Hostage, Measurement) {
        let Report::Sealed(measurement) = self.vault.order(&Order::Seal) else { panic!("it is not sealed") };
        let len = self.vcpus as usize * PAGE_SIZE as usize;
        let pages = MmapRegion::from_file(FileOffset::new(self.pages, 0), len).unwrap();
        let last = vec![0; self.vcpus as usize];
        (Hostage { vault: self.vault, shared: self.shared, kicks: self.kicks, pages, last }, measurement)
    }
}

/// A guest whose VMM does what it likes.
pub struct Hostage {
    pub vault: Vault,
    pub shared: File,
    pub kicks: OwnedFd,
    pub pages: MmapRegion,
    /// The number of the last request on each page.
    pub last: Vec<u32>,
}

/// Where things are on a page.
pub mod at {
    pub const REQUEST: usize = 0;
    pub const REQUEST_MESSAGE: usize = 64;
    pub const REPLY: usize = 192;
    pub const REPLY_MESSAGE: usize = 256;
    pub const KICK: usize = 384;
    pub const REQUEST_TEXT: usize = 512;
    pub const REPLY_TEXT: usize = 1024;
}

/// The first vCPU.
pub const FIRST: u32 = 0;

impl Hostage {
    pub fn start(vcpus: u32, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Self {
        let mut loading = Loading::start(vcpus);
        loading.load_all(write);
        loading.seal().0
    }

    pub fn word(&self, vcpu: u32, at: usize) -> &AtomicU32 {
        self.pages.get_atomic_ref(vcpu as usize * PAGE_SIZE as usize + at).unwrap()
    }

    /// Fills a part of a page.
    pub fn fill(&self, vcpu: u32, at: usize, bytes: &[u8]) {
        self.pages.as_volatile_slice().write_slice(bytes, vcpu as usize * PAGE_SIZE as usize + at).unwrap();
    }

    /// Says that there is a request, and wakes whoever sleeps until then.
    pub fn ring(&self, vcpu: u32, sequence: u32) {
        let word = self.word(vcpu, at::REQUEST);
        word.store(sequence, Ordering::SeqCst);
        futex::wake(word, futex::Flags::empty(), 1).unwrap();
    }

    pub fn post(&self, vcpu: u32, sequence: u32, message: &Message, text: &[u8]) {
        for (word, bytes) in (0..).zip(message.as_bytes().chunks_exact(8)) {
            let at = vcpu as usize * PAGE_SIZE as usize + at::REQUEST_MESSAGE + 8 * word;
            let slot: &AtomicU64 = self.pages.get_atomic_ref(at).unwrap();
            slot.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        self.fill(vcpu, at::REQUEST_TEXT, text);
        self.ring(vcpu, sequence);
    }

    /// The reply with this number, which has to come in time; nothing if the vault has ended.
    pub fn hear(&mut self, vcpu: u32, sequence: u32) -> Option<Reply> {
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

    pub fn next(&mut self, vcpu: u32) -> u32 {
        let last = &mut self.last[vcpu as usize];
        *last = (*last + 1) & !(1 << 31);
        *last
    }

    pub fn ask(&mut self, vcpu: u32, request: &Request) -> Reply {
        let sequence = self.next(vcpu);
        let (message, text) = request.encode();
        self.post(vcpu, sequence, &Message { sequence, ..message }, text.as_bytes());
        self.hear(vcpu, sequence).expect("the vault has ended")
    }

    #[track_caller]
    pub fn refused(&mut self, request: &Request) {
        let reply = self.ask(FIRST, request);
        assert!(matches!(reply, Reply::Refused(_)), "{request:?}: {reply:?}");
    }

    /// Wakes the vault for kicks.
    pub fn signal(&self) {
        rustix::net::send(&self.kicks, &[0], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).unwrap();
    }

    #[track_caller]
    pub fn outdated(&mut self, request: &Request) {
        let reply = self.ask(FIRST, request);
        assert!(matches!(reply, Reply::Outdated(_)), "{request:?}: {reply:?}");
    }

    /// Runs the first vCPU up to its next exit.
    #[track_caller]
    pub fn run(&mut self, given: Given) -> Exit {
        match self.ask(FIRST, &Request::Run(given)) {
            Reply::Exit(exit) => exit,
            reply => panic!("no exit: {reply:?}"),
        }
    }
}
