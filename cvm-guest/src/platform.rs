#![allow(unsafe_code, reason = "conversions discard memory, so the methods that ask for them are unsafe")]

use crate::hypercall::{EAGAIN, EINVAL, KVM_EINVAL};
use crate::{Error, Machine, SharedRegion};
use core::fmt;
use cvm_core::boot::{self, BootPage, FreshMemory};
use cvm_core::doorbell::{DEVICE_SPACE, MAX_DEVICES, Transport, control, device_base};
use cvm_core::{Answer, GpaRange, PAGE_SIZE, Side, Trigger};

/// Whether to ask a host once more that did not convert and wants to be asked again; it is told how often the host said so
/// to this request. A guest that has a clock stops after a time, and one with nothing else to do may go on for ever. A number
/// of tries says nothing: a busy host answers a thousand times in a moment.
pub type Patience = fn(tries: u64) -> bool;

/// The host as the guest reaches it.
#[derive(Debug, Clone, Copy)]
pub struct Platform<M> {
    machine: M,
    transport: Transport,
    /// What to add to the address of a page to reach it while it is shared.
    shared_at: u64,
    patience: Patience,
    /// From this address on private memory is undefined until it is written to, if it is undefined anywhere.
    undefined_from: Option<u64>,
}

impl<M: Machine> Platform<M> {
    /// The platform that `boot` describes, reached by `machine`. `patience` limits how long the guest waits for a host that puts
    /// it off.
    ///
    /// # Errors
    /// [`Error::BootPage`] if it asks for a transport, or describes fresh memory in a way, that this version does not know.
    pub fn new(boot: &BootPage, machine: M, patience: Patience) -> Result<Self, Error> {
        if boot.magic != boot::MAGIC {
            return Err(Error::BootPage("magic"));
        }
        let transport = boot.transport().ok_or(Error::BootPage("transport"))?;
        let fresh_memory = boot.fresh_memory().ok_or(Error::BootPage("fresh memory"))?;
        let undefined_from = (fresh_memory == FreshMemory::Undefined).then_some(boot.accepted);
        Ok(Self { machine, transport, shared_at: boot.shared_at, patience, undefined_from })
    }

    /// The instructions that reach the host.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// Makes `range` private or shared. Its contents are lost.
    ///
    /// # Safety
    /// As for [`Machine::convert`]: nothing of the guest may be in `range`.
    /// ```compile_fail,E0133
    /// fn convert(platform: &cvm_guest::Platform<impl cvm_guest::Machine>, stack: cvm_core::GpaRange) {
    ///     let _ = platform.convert(stack, cvm_core::Side::Shared);
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::NotConverted`] when the host refuses, or puts the guest off for longer than its patience lasts; the request can
    /// be repeated then, by the same vCPU and before that vCPU asks for another conversion: under SEV-SNP it alone knows where
    /// the host has stopped, and else the guest ends. [`Error::UnknownAnswer`], [`Error::TooFar`]. Some pages may have been
    /// converted then.
    pub unsafe fn convert(&self, range: GpaRange, to: Side) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            // SAFETY: passed on to the caller.
            let answer = unsafe {
                match self.transport {
                    Transport::Hypercall | Transport::PageState => self.ask_by_hypercall(range, to)?,
                    Transport::Doorbell => self.ask_by_doorbell(range, to, tries == 0)?,
                }
            };
            tries += 1;
            match answer {
                Answer::Done => return Ok(()),
                Answer::Retry if (self.patience)(tries) => core::hint::spin_loop(),
                Answer::Retry | Answer::Invalid => return Err(Error::NotConverted { range, to, answer }),
            }
        }
    }

    /// # Safety
    /// As for [`Machine::convert`].
    unsafe fn ask_by_hypercall(&self, range: GpaRange, to: Side) -> Result<Answer, Error> {
        // SAFETY: passed on to the caller.
        match unsafe { self.machine.convert(range, to) } {
            0 => Ok(Answer::Done),
            EINVAL | KVM_EINVAL => Ok(Answer::Invalid),
            EAGAIN => Ok(Answer::Retry),
            answer => Err(Error::UnknownAnswer { range, answer }),
        }
    }

    /// # Safety
    /// As for [`Machine::convert`].
    unsafe fn ask_by_doorbell(&self, range: GpaRange, to: Side, is_first: bool) -> Result<Answer, Error> {
        let narrow = |number: u64| u32::try_from(number).map_err(|_| Error::TooFar(range));
        let (frame, pages) = (narrow(range.start().0 / PAGE_SIZE)?, narrow(range.pages())?);
        // SAFETY: passed on to the caller. In a second round the registers hold what is left of the same range.
        unsafe {
            if is_first {
                self.machine.write(control::CONVERT_FRAME, frame);
                self.machine.write(control::CONVERT_PAGES, pages);
            }
            self.machine.write(control::CONVERT, to as u32);
        }
        let answer = self.machine.read(control::CONVERT);
        Answer::from_u32(answer).ok_or(Error::UnknownAnswer { range, answer: answer.into() })
    }

    /// Shares `range` and returns it as memory that the host can write.
    ///
    /// # Safety
    /// The guest must map `range` to the same virtual addresses, and where the boot page says so to those `shared_at` above
    /// them; there writable. It must not use the range in any other way, nor have references into it, until
    /// [`Platform::unshare`] has given it back. So no two regions may have a page in common.
    ///
    /// # Errors
    /// [`Error::NoPointer`], and as [`Platform::convert`]. The range must not be used for anything then: part of it may
    /// be shared.
    pub unsafe fn share(&self, range: GpaRange) -> Result<SharedRegion, Error> {
        // SAFETY: passed on to the caller.
        let region = unsafe { SharedRegion::new(range, self.shared_at)? };
        // SAFETY: the caller promises that nothing else uses the range.
        unsafe { self.convert(range, Side::Shared)? };
        Ok(region)
    }

    /// Takes a region back; its pages are private then, with contents that nobody should rely on.
    ///
    /// # Errors
    /// As [`Platform::convert`]. The pages are lost to the guest then: part of them may still be shared.
    pub fn unshare(&self, region: SharedRegion) -> Result<GpaRange, Error> {
        let range = region.range();
        // SAFETY: whoever made the region promised that nothing else is in its range, and the region ends here.
        unsafe { self.convert(range, Side::Private)? };
        Ok(range)
    }

    /// Makes private memory usable that was not loaded and that nobody has used yet: it is zero then. Where the platform does not
    /// see to that, zeros are written here, so an allocator calls this once for what it hands out. Memory below
    /// [`BootPage::accepted`] is usable as the launch left it, and stays as it is.
    ///
    /// # Safety
    /// The range must be memory, private, and mapped writable to the same virtual addresses. From [`BootPage::accepted`] on
    /// nothing of the guest may be in it: its contents are lost.
    /// ```compile_fail,E0133
    /// fn accept(platform: &cvm_guest::Platform<impl cvm_guest::Machine>, stack: cvm_core::GpaRange) {
    ///     let _ = platform.accept(stack);
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Sev`] when `range` is not all memory and the guest is one that can tell.
    pub unsafe fn accept(&self, range: GpaRange) -> Result<(), Error> {
        self.machine.accept(range)?;
        if let Some(from) = self.undefined_from {
            let start = range.start().0.max(from);
            let len = range.end().0.saturating_sub(start);
            let (Ok(at), Ok(len)) = (usize::try_from(start), usize::try_from(len)) else {
                return Err(Error::TooFar(range));
            };
            // SAFETY: the caller promises memory that is mapped there, and that nobody uses; nothing is written if nothing of it
            // is undefined.
            unsafe { core::ptr::with_exposed_provenance_mut::<u8>(at).write_bytes(0, len) };
        }
        Ok(())
    }

    /// Accepts the interrupt with `vector` and this trigger on this vCPU from now on; the host may inject no others.
    /// A vector keeps the trigger that it was first accepted with: asking for the other one ends this vCPU, as does a
    /// level on a local APIC.
    ///
    /// # Errors
    /// [`Error::Exception`] below 32.
    pub fn accept_interrupt(&self, vector: u8, trigger: Trigger) -> Result<(), Error> {
        if vector < 32 {
            return Err(Error::Exception(vector));
        }
        let level = if trigger == Trigger::Level { control::ACCEPT_LEVEL } else { 0 };
        // SAFETY: the register changes no memory.
        unsafe { self.machine.write(control::ACCEPT, u32::from(vector) | level) };
        Ok(())
    }

    /// The console.
    pub fn console(&self) -> Console<'_, M> {
        Console(&self.machine)
    }

    /// The registers of device `device`.
    ///
    /// # Errors
    /// [`Error::NoDevice`] from [`MAX_DEVICES`] on.
    pub fn device(&self, device: u16) -> Result<DeviceRegisters<&M>, Error> {
        if device >= MAX_DEVICES {
            return Err(Error::NoDevice(device));
        }
        Ok(DeviceRegisters { machine: &self.machine, base: device_base(device) })
    }

    /// Ends the guest with `code`, where 0 is success. A host that runs it on nevertheless finds it repeating itself.
    pub fn end(&self, code: u32) -> ! {
        loop {
            // SAFETY: the register changes no memory.
            unsafe { self.machine.write(control::END, code) };
        }
    }
}

/// Where a guest writes for people to read. The host sees every byte, so no secrets belong there.
#[derive(Debug)]
pub struct Console<'a, M>(&'a M);

impl<M: Machine> fmt::Write for Console<'_, M> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the register changes no memory.
        text.bytes().for_each(|byte| unsafe { self.0.write(control::CONSOLE, byte.into()) });
        Ok(())
    }
}

/// The doorbell registers of one device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRegisters<M> {
    machine: M,
    base: u16,
}

impl<M: Machine> DeviceRegisters<M> {
    /// Reads the 32 bits at `offset`, a multiple of four. Offsets count modulo [`DEVICE_SPACE`], so that none leads to
    /// another device.
    pub fn read(&self, offset: u16) -> u32 {
        self.machine.read(self.base + offset % DEVICE_SPACE)
    }

    /// Writes the 32 bits at `offset`, as for [`DeviceRegisters::read`].
    pub fn write(&self, offset: u16, value: u32) {
        // SAFETY: the register is one of a device's below `MAX_DEVICES`. By it the host is told of memory, and can do with
        // that what it always can: write what is shared.
        unsafe { self.machine.write(self.base + offset % DEVICE_SPACE, value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::doorbell::{Access, Registers, Ring};
    use cvm_core::{ConversionRequest, Exit, Gpa};
    use std::cell::{Cell, RefCell};
    use zerocopy::FromZeros;

    /// A host that listens as the contract says and answers what it is told to.
    #[derive(Debug)]
    struct Host {
        registers: RefCell<Registers>,
        requests: RefCell<Vec<ConversionRequest>>,
        answers: RefCell<Vec<u64>>,
        console: RefCell<Vec<u8>>,
        accepted: RefCell<Vec<(u8, Trigger)>>,
        raw_answer: Cell<Option<u32>>,
        /// How far it says that requests get; nowhere if it says nothing.
        reached: Cell<Option<Gpa>>,
    }

    impl Host {
        fn new(answers: &[u64]) -> Self {
            Self {
                registers: RefCell::new(Registers::new(0)),
                requests: RefCell::default(),
                answers: RefCell::new(answers.iter().rev().copied().collect()),
                console: RefCell::default(),
                accepted: RefCell::default(),
                raw_answer: Cell::default(),
                reached: Cell::default(),
            }
        }

        fn answer(&self, request: ConversionRequest) -> u64 {
            self.requests.borrow_mut().push(request);
            self.answers.borrow_mut().pop().unwrap_or(0)
        }
    }

    impl Machine for Host {
        unsafe fn write(&self, register: u16, value: u32) {
            let ring = self.registers.borrow_mut().access(register, Access::Write(value)).unwrap();
            match ring {
                Ring::Exit(Exit::Conversion(request)) => match self.answer(request) {
                    raw if Answer::from_u32(raw as u32).is_none() => self.raw_answer.set(Some(raw as u32)),
                    known => {
                        let answer = Answer::from_u32(known as u32).unwrap();
                        self.registers.borrow_mut().answer(answer, self.reached.get().unwrap_or(request.gpa()));
                    }
                },
                Ring::Accept(vector, trigger) => self.accepted.borrow_mut().push((vector, trigger)),
                Ring::Exit(Exit::Console(byte)) => self.console.borrow_mut().push(byte),
                _ => {}
            }
        }

        fn read(&self, register: u16) -> u32 {
            match self.registers.borrow_mut().access(register, Access::Read).unwrap() {
                Ring::Value(value) => self.raw_answer.get().unwrap_or(value),
                other => panic!("{other:?}"),
            }
        }

        unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
            self.answer(ConversionRequest::from_guest(0, range.start().0, range.pages(), to))
        }
    }

    fn platform(host: &Host, transport: Transport) -> Platform<&Host> {
        let boot = BootPage { magic: boot::MAGIC, transport: transport as u32, ..BootPage::new_zeroed() };
        Platform::new(&boot, host, |tries| tries < PATIENCE).unwrap()
    }

    /// How often a host may put off the guest of a test.
    const PATIENCE: u64 = 5000;

    fn convert(platform: &Platform<&Host>, range: GpaRange, to: Side) -> Result<(), Error> {
        // SAFETY: this host converts nothing.
        unsafe { platform.convert(range, to) }
    }

    fn range() -> GpaRange {
        GpaRange::from_pages(0x20_0000, 3).unwrap()
    }

    #[test]
    fn accepted_memory_is_zero_where_it_was_undefined_and_as_it_was_elsewhere() {
        const PAGE: usize = PAGE_SIZE as usize;
        #[repr(align(4096))]
        struct Memory([u8; 4 * PAGE]);
        let accept = |fresh_memory: FreshMemory, from: usize, pages: std::ops::Range<usize>| {
            let memory = Box::leak(Box::new(Memory([0x2a; 4 * PAGE])));
            let base = memory.0.as_mut_ptr().expose_provenance() as u64;
            let boot = BootPage {
                magic: boot::MAGIC,
                accepted: base + (from * PAGE) as u64,
                fresh_memory: fresh_memory as u64,
                ..BootPage::new_zeroed()
            };
            let host = Host::new(&[]);
            let platform = Platform::new(&boot, &host, |_| false).unwrap();
            let range = GpaRange::from_pages(base + (pages.start * PAGE) as u64, pages.len() as u64).unwrap();
            // SAFETY: it is leaked memory of the test's own, mapped where it is, and there is no reference into it.
            unsafe { platform.accept(range).unwrap() };
            // SAFETY: as above.
            let page = |page: usize| unsafe {
                core::ptr::with_exposed_provenance::<[u8; PAGE]>(base as usize + page * PAGE).read()
            };
            std::array::from_fn::<_, 4, _>(|number| page(number)[0] + page(number)[PAGE - 1])
        };
        assert_eq!(accept(FreshMemory::Undefined, 0, 1..3), [0x54, 0, 0, 0x54]);
        assert_eq!(accept(FreshMemory::Undefined, 2, 1..4), [0x54, 0x54, 0, 0]);
        assert_eq!(accept(FreshMemory::Undefined, 3, 0..2), [0x54; 4]);
        assert_eq!(accept(FreshMemory::Zero, 0, 0..4), [0x54; 4]);
    }

    #[test]
    fn a_boot_page_that_describes_fresh_memory_in_no_known_way_is_refused() {
        let host = Host::new(&[]);
        let boot = BootPage { magic: boot::MAGIC, fresh_memory: 2, ..BootPage::new_zeroed() };
        assert_eq!(Platform::new(&boot, &host, |_| false).unwrap_err(), Error::BootPage("fresh memory"));
    }

    #[test]
    fn both_transports_ask_the_same_and_try_again_when_told_to() {
        for (transport, retry) in [(Transport::Hypercall, EAGAIN), (Transport::Doorbell, Answer::Retry as u64)] {
            let host = Host::new(&[retry, retry, 0]);
            convert(&platform(&host, transport), range(), Side::Shared).unwrap();
            let request = ConversionRequest::from_guest(0, 0x20_0000, 3, Side::Shared);
            assert_eq!(*host.requests.borrow(), [request; 3], "{transport:?}");
        }
    }

    #[test]
    fn by_doorbell_the_next_try_asks_for_what_is_left() {
        let host = Host::new(&[Answer::Retry as u64, 0]);
        host.reached.set(Some(Gpa(0x20_1000)));
        convert(&platform(&host, Transport::Doorbell), range(), Side::Shared).unwrap();
        let request = |gpa, pages| ConversionRequest::from_guest(0, gpa, pages, Side::Shared);
        assert_eq!(*host.requests.borrow(), [request(0x20_0000, 3), request(0x20_1000, 2)]);
    }

    #[test]
    fn a_host_that_says_retry_holds_the_guest_as_long_as_its_patience_lasts() {
        for (transport, retry) in [(Transport::Hypercall, EAGAIN), (Transport::Doorbell, Answer::Retry as u64)] {
            let host = Host::new(&vec![retry; PATIENCE as usize - 1]);
            convert(&platform(&host, transport), range(), Side::Private).unwrap();
            let host = Host::new(&vec![retry; PATIENCE as usize]);
            let error = convert(&platform(&host, transport), range(), Side::Private).unwrap_err();
            assert_eq!(error, Error::NotConverted { range: range(), to: Side::Private, answer: Answer::Retry });
        }
    }

    #[test]
    fn answers_that_mean_nothing_are_errors() {
        for transport in [Transport::Hypercall, Transport::Doorbell] {
            let host = Host::new(&[77]);
            let error = convert(&platform(&host, transport), range(), Side::Shared).unwrap_err();
            assert_eq!(error, Error::UnknownAnswer { range: range(), answer: 77 });
        }
        for invalid in [EINVAL, KVM_EINVAL] {
            let host = Host::new(&[invalid]);
            let error = convert(&platform(&host, Transport::Hypercall), range(), Side::Shared).unwrap_err();
            assert!(matches!(error, Error::NotConverted { answer: Answer::Invalid, .. }));
        }
    }

    #[test]
    fn a_boot_page_of_another_kind_is_refused() {
        let host = Host::new(&[]);
        let mut boot = BootPage { magic: boot::MAGIC, transport: 9, ..BootPage::new_zeroed() };
        assert_eq!(Platform::new(&boot, &host, |_| false).unwrap_err(), Error::BootPage("transport"));
        boot.magic = 1;
        assert_eq!(Platform::new(&boot, &host, |_| false).unwrap_err(), Error::BootPage("magic"));
    }

    #[test]
    fn devices_beyond_the_last_and_memory_without_a_pointer_are_refused() {
        let host = Host::new(&[]);
        let platform = platform(&host, Transport::Doorbell);
        assert_eq!(platform.device(MAX_DEVICES).unwrap_err(), Error::NoDevice(MAX_DEVICES));
        assert!(platform.device(MAX_DEVICES - 1).is_ok());
        let first = GpaRange::from_pages(0, 1).unwrap();
        // SAFETY: nothing is shared, because the range has no pointer.
        let refused = unsafe { platform.share(first) };
        assert_eq!(refused.unwrap_err(), Error::NoPointer(first));
        assert!(host.requests.borrow().is_empty());
    }

    #[test]
    fn interrupts_are_accepted_by_vector_and_exceptions_are_not() {
        let host = Host::new(&[]);
        let platform = platform(&host, Transport::Hypercall);
        let accepted = [(0x41, Trigger::Edge), (0x42, Trigger::Level)];
        for (vector, trigger) in accepted {
            platform.accept_interrupt(vector, trigger).unwrap();
        }
        assert_eq!(*host.accepted.borrow(), accepted);
        assert_eq!(platform.accept_interrupt(31, Trigger::Edge), Err(Error::Exception(31)));
    }

    #[test]
    fn the_console_carries_bytes() {
        let host = Host::new(&[]);
        fmt::Write::write_str(&mut platform(&host, Transport::Doorbell).console(), "hello\n").unwrap();
        assert_eq!(*host.console.borrow(), b"hello\n");
    }

    #[test]
    fn what_the_doorbell_cannot_name_is_refused_before_it_rings() {
        let host = Host::new(&[]);
        let far = GpaRange::from_pages(PAGE_SIZE << 32, 1).unwrap();
        let error = convert(&platform(&host, Transport::Doorbell), far, Side::Shared).unwrap_err();
        assert_eq!(error, Error::TooFar(far));
        assert!(host.requests.borrow().is_empty());
    }
}
