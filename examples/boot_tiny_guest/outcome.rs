//! What a run came to: facts, checks, and a table of them.

use crate::attempts::Attempt;
use crate::disk::Disk;
use crate::machine::{End, Machine};
use crate::program::chain;
use cvm::doorbell::Transport;
use cvm::interrupt::Guarding;
use cvm::memory::Allocated;
use cvm::sev::snp::of_transcript;
use cvm::sev::{HostData, SevFeatures};
use cvm::{BoxError, Error, Gpa, Lifecycle, LifecycleAnswer, PAGE_SIZE, Protection, Vm};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::time::Duration;
use tiny_guest::{MIN_MEMORY, MMIO, POOL_LEN, ROUNDS, Task, VCPU_PAGES, report_data};

/// Where a report of SEV-SNP has what the guest wanted in it, the measurement, and what the host gave at the launch (AMD
/// publication 56860, table 23).
const ATTESTED_DATA: Range<usize> = 0x50..0x90;
const ATTESTED_MEASUREMENT: Range<usize> = 0x90..0xc0;
const ATTESTED_HOST_DATA: Range<usize> = 0xc0..0xe0;

/// From this much memory on the guest uses some that nothing was loaded to.
const ACCEPTING_MEMORY: u64 = MIN_MEMORY + 2 * POOL_LEN;

/// A fact that the VMM checked.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What should be so.
    what: &'static str,
    /// What was found.
    found: String,
    /// Whether it is so.
    holds: bool,
}

/// Pages that were converted.
#[derive(Debug, Serialize)]
struct Conversions {
    requests: u64,
    refused: u64,
    pages_to_shared: u64,
    pages_to_private: u64,
}

/// Memory that the VM occupied when the guest reported, or else at its end, in bytes. A number is missing where the host does
/// not tell.
#[derive(Debug, Serialize)]
struct Memory {
    private: Option<u64>,
    shared: Option<u64>,
    /// Why neither number is known.
    error: Option<String>,
}

impl From<Result<Allocated, String>> for Memory {
    fn from(allocated: Result<Allocated, String>) -> Self {
        match allocated {
            Ok(Allocated { private, shared }) => Self { private, shared: Some(shared), error: None },
            Err(error) => Self { private: None, shared: None, error: Some(error) },
        }
    }
}

/// Everything about a run.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Whether every check holds and every attempt went as expected.
    pub ok: bool,
    isolation: String,
    measurement: String,
    /// What the guest was given, beside its task, so that no run is like another. It has 64 bits, which not every reader of
    /// JSON keeps in a number.
    nonce: String,
    transport: &'static str,
    ends: Vec<String>,
    exits: BTreeMap<&'static str, u64>,
    conversions: Conversions,
    refused_conversions: Vec<String>,
    disk_sha256: Option<String>,
    bounced_to_device: u64,
    bounced_from_device: u64,
    memory: Memory,
    interrupts_guarded_by: &'static str,
    launch_ms: u64,
    run_ms: u64,
    checks: Vec<Check>,
    attempts: Vec<Attempt>,
    lifecycle: BTreeMap<String, String>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A number of bytes, if the host has told one.
fn told(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "an unknown number".into(), |bytes| bytes.to_string())
}

fn memory_len<V: Vm>(machine: &Machine<'_, V>) -> u64 {
    machine.vm.memory().map().slots().ranges().iter().map(|slot| slot.len()).sum()
}

fn describe(end: &End) -> String {
    match end {
        End::Halted => "halted".into(),
        End::Ended(code) => format!("ended with code {code}"),
        End::Failed(error) => chain(error),
        End::TimedOut => "ran too long and was stopped".into(),
        End::Stopped => "stopped with the vm".into(),
    }
}

/// The set and the reason with which a guest of SEV-ES or SEV-SNP ends that was told of an access to where there is no
/// page: [`Termination::Vc`](cvm_guest::sev::Termination) with the error code 0x400.
const NO_PAGE: (u8, u8) = (0xf, 0);

/// The code with which a guest ends that has no #VC, after a page fault.
const PAGE_FAULT: u32 = cvm_guest::EXCEPTION + 14;

/// What the backend says when KVM had to emulate an instruction and could not read it.
const NOT_EXECUTED: &str = "kvm could not execute an instruction";

/// Whether KVM may be unable to read the guest's instructions.
fn is_unreadable(protection: Protection) -> bool {
    matches!(protection, Protection::GuestMemfd | Protection::Vault)
}

/// Whether vCPU 0 ended by an access to [`MMIO`], which is what it said that it would try.
fn is_refused_mmio(end: &End, protection: Protection) -> bool {
    match end {
        End::Failed(Error::MmioRefused { vcpu: 0, gpa: Gpa(MMIO), write: false }) => true,
        End::Failed(Error::Terminated { vcpu: 0, reason: Some(NO_PAGE) }) => {
            matches!(protection, Protection::SevEs | Protection::SevSnp)
        }
        // KVM would have to read the instruction to say more, which is in private memory. It tells the guest of a page fault
        // then, or gives up.
        End::Ended(PAGE_FAULT) => is_unreadable(protection),
        End::Failed(Error::Crashed { vcpu: 0, reason }) => is_unreadable(protection) && reason == NOT_EXECUTED,
        _ => false,
    }
}

/// How a run went, apart from what is left in the machine and on the disk.
pub struct Run {
    /// What the guest was told to do.
    pub task: Task,
    /// What protected it.
    pub protection: Protection,
    /// How it asked for conversions.
    pub transport: Transport,
    /// How each vCPU ended.
    pub ends: Vec<End>,
    /// How long the launch took.
    pub launched: Duration,
    /// How long the guest ran.
    pub ran: Duration,
}

impl Outcome {
    /// Looks at what is left of a run.
    pub fn new<V: Vm>(machine: &Machine<'_, V>, disk: &Disk, run: Run) -> Result<Self, BoxError> {
        let Run { task, protection, transport, ends, launched, ran } = run;
        let totals = machine.vm.conversions();
        let finding = machine.finding().take();
        let mut checks = Vec::new();
        let mut check = |what, found: String, holds| checks.push(Check { what, found, holds });

        check("the guest was told to do its work", format!("{task:?}"), task == Task::Work);
        check("the guest reported", if finding.is_some() { "yes" } else { "no" }.into(), finding.is_some());
        if let Some(finding) = &finding {
            let report = &finding.report;
            let served = machine.disk().served().clone();
            let sha256 = hex(&report.sha256);
            check("the guest read the whole disk", sha256.clone(), report.sha256 == disk.sha256());
            check("the disk's length reached the guest", report.disk_len.to_string(), report.disk_len == disk.len());
            let written = disk.holds_what_was_written(report, machine.observer().nonce)?;
            check("what the guest wrote is in the file", format!("sector {}", report.written_at), written);
            let unchanged = disk.is_unchanged_elsewhere(report)?;
            check("the rest of the file is unchanged", unchanged.to_string(), unchanged);
            check("the guest read back what it wrote", (report.read_back == 1).to_string(), report.read_back == 1);
            check(
                "the device refused a private address",
                format!("{:#x}", served.refused_address),
                served.refused == 1 && report.private_descriptor_refused == 1,
            );
            let others = ends.len() as u64 - 1;
            check("every vcpu did its part", report.vcpus.to_string(), u64::from(report.vcpus) == others + 1);
            // The pool and the report once; the other vCPUs' pages in each round.
            let to_private = 1 + others * ROUNDS * VCPU_PAGES;
            // Under SEV-SNP also what it talks by: a page for each vCPU, and two for messages to the secure processor.
            let kept = if protection == Protection::SevSnp { others + 1 + 2 } else { 0 };
            let to_shared = POOL_LEN / PAGE_SIZE + to_private + kept;
            check(
                "as many pages were converted as the guest asked for",
                format!("{} to shared, {} to private", totals.to_shared, totals.to_private),
                (totals.to_shared, totals.to_private, totals.refused) == (to_shared, to_private, 0)
                    && report.converted_by_others == others * ROUNDS * 2 * VCPU_PAGES,
            );
            let memory = memory_len(machine);
            let shared_by_map = finding.shared_pages * PAGE_SIZE;
            check(
                "no page has both private and shared memory",
                match &finding.allocated {
                    Ok(Allocated { private, shared }) => {
                        format!("{} private, {shared} shared of {shared_by_map}", told(*private))
                    }
                    Err(error) => error.clone(),
                },
                finding.allocated.as_ref().is_ok_and(|Allocated { private, shared }| {
                    *shared <= shared_by_map && private.is_none_or(|private| private <= memory - shared_by_map)
                }),
            );
        }
        let predicted =
            (protection == Protection::SevSnp).then(|| of_transcript(machine.vm.transcript(), SevFeatures::SNP_ACTIVE));
        if let (Some(finding), Some(predicted)) = (&finding, &predicted) {
            let attestation = &finding.report.attestation;
            let measurement = &attestation[ATTESTED_MEASUREMENT];
            check("the guest's report has the predicted measurement", hex(measurement), measurement == predicted.0);
            let host_data = &attestation[ATTESTED_HOST_DATA];
            let config = machine.vm.transcript().config().map(|config| HostData::ConfigDigest.bytes(&config));
            check(
                "the guest's report has the digest of the launch configuration as host data",
                hex(host_data),
                config.is_some_and(|config| host_data == config),
            );
            let data = &attestation[ATTESTED_DATA];
            check(
                "the report has the vmm's nonce",
                hex(&data[..8]),
                finding.report.attested == 1 && data == report_data(machine.observer().nonce),
            );
        }
        if let Some(finding) = &finding {
            let wanted = if memory_len(machine) >= ACCEPTING_MEMORY { POOL_LEN } else { 0 };
            let accepted = finding.report.accepted;
            check("the guest used memory that was not loaded", accepted.to_string(), accepted == wanted);
        }
        let mmio = machine.tries_mmio() && ends.first().is_some_and(|end| is_refused_mmio(end, protection));
        let found = ends.first().map(describe).unwrap_or_default();
        let found = if machine.tries_mmio() { found } else { format!("the guest did not try: {found}") };
        check("the guest's mmio was refused", found, mmio);
        let halted = ends.iter().skip(1).all(|end| matches!(end, End::Halted));
        check("the other vcpus halted", ends.iter().skip(1).map(describe).collect::<Vec<_>>().join(", "), halted);

        let attempts = finding.as_ref().is_some_and(|finding| finding.attempts.iter().all(|attempt| attempt.expected));
        let lifecycle = Lifecycle::ALL.map(|what| {
            let answer = match machine.vm.lifecycle(what) {
                LifecycleAnswer::Yes => "yes".into(),
                LifecycleAnswer::No(reason) => format!("no: {reason}"),
            };
            (format!("{what:?}"), answer)
        });
        // The report on a vault that was killed does without it.
        let allocated = match &finding {
            Some(finding) => finding.allocated.clone(),
            None => machine.vm.allocated().map_err(|error| chain(&error)),
        };
        Ok(Self {
            ok: attempts && checks.iter().all(|check| check.holds),
            isolation: protection.to_string(),
            measurement: predicted.unwrap_or_else(|| machine.vm.transcript().measurement()).to_string(),
            nonce: format!("{:#x}", machine.observer().nonce),
            transport: match transport {
                Transport::Hypercall => "hypercall",
                Transport::PageState => "page state",
                Transport::Doorbell => "doorbell",
            },
            ends: ends.iter().map(describe).collect(),
            exits: machine.exits(),
            conversions: Conversions {
                requests: totals.requests,
                refused: totals.refused,
                pages_to_shared: totals.to_shared,
                pages_to_private: totals.to_private,
            },
            refused_conversions: machine.refused(),
            disk_sha256: finding.as_ref().map(|finding| hex(&finding.report.sha256)),
            bounced_to_device: finding.as_ref().map_or(0, |finding| finding.report.bounced_to_device),
            bounced_from_device: finding.as_ref().map_or(0, |finding| finding.report.bounced_from_device),
            memory: allocated.into(),
            interrupts_guarded_by: match machine.vm.guarding() {
                Guarding::Library => "this library, in the vmm's process",
                Guarding::Enforced => "a party that the vmm cannot get around",
            },
            launch_ms: launched.as_millis() as u64,
            run_ms: ran.as_millis() as u64,
            checks,
            attempts: finding.map(|finding| finding.attempts).unwrap_or_default(),
            lifecycle: lifecycle.into(),
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<24}{value}");
        row("isolation", &self.isolation)?;
        row("measurement", &self.measurement)?;
        row("nonce", &self.nonce)?;
        row("disk sha-256", &self.disk_sha256.as_deref().unwrap_or("none"))?;
        row("conversions by", &self.transport)?;
        row(
            "pages converted",
            &format!(
                "{} to shared, {} to private",
                self.conversions.pages_to_shared, self.conversions.pages_to_private
            ),
        )?;
        for reason in &self.refused_conversions {
            row("conversion refused", reason)?;
        }
        row(
            "bytes bounced",
            &format!("{} to the device, {} from it", self.bounced_to_device, self.bounced_from_device),
        )?;
        match &self.memory {
            Memory { error: Some(error), .. } => row("memory allocated", &format!("unknown: {error}"))?,
            Memory { private, shared, .. } => {
                row("memory allocated", &format!("{} private, {} shared", told(*private), told(*shared)))?
            }
        }
        for (kind, count) in &self.exits {
            row(&format!("exits: {kind}"), count)?;
        }
        for (index, end) in self.ends.iter().enumerate() {
            row(&format!("vcpu {index}"), end)?;
        }
        row("interrupts guarded by", &self.interrupts_guarded_by)?;
        row("time", &format!("{} ms to launch, {} ms to run", self.launch_ms, self.run_ms))?;

        writeln!(f, "\nwhat the vmm tried")?;
        for attempt in &self.attempts {
            let verdict = match (attempt.expected, attempt.reached) {
                (true, false) => "refused ",
                (true, true) => "open    ",
                (false, _) => "WRONG   ",
            };
            writeln!(f, "  {verdict}{}: {}", attempt.what, attempt.result)?;
        }
        writeln!(f, "\nwhat the vmm checked")?;
        for check in &self.checks {
            let verdict = if check.holds { "holds   " } else { "FAILS   " };
            writeln!(f, "  {verdict}{}: {}", check.what, check.found)?;
        }
        writeln!(f, "\n{}", if self.ok { "all is as it should be" } else { "something is not as it should be" })
    }
}
