//! Every attack with what is expected of it.

use crate::outcome::Outcome::{self, Absent, Open, OpenInFile, Refused};
use crate::outcome::Row;
use cvm::platform::{Asset, Party, Powers};

/// Rows of one attacker.
pub struct Table {
    pub title: &'static str,
    pub text: &'static str,
    /// Who attacks; nothing for a guest and for nobody.
    pub party: Option<Party>,
    pub rows: &'static [Row],
}

const MEMORY_READ: Option<(Asset, Powers)> = Some((Asset::PrivateMemory, Powers::READ));
const MEMORY_WRITE: Option<(Asset, Powers)> = Some((Asset::PrivateMemory, Powers::WRITE));
const MEMORY_REMAP: Option<(Asset, Powers)> = Some((Asset::PrivateMemory, Powers::REMAP));
const MEMORY_STEER: Option<(Asset, Powers)> = Some((Asset::PrivateMemory, Powers::STEER));
const REGISTERS_READ: Option<(Asset, Powers)> = Some((Asset::Registers, Powers::READ));
const REGISTERS_STEER: Option<(Asset, Powers)> = Some((Asset::Registers, Powers::STEER));
const INTERRUPTS_WRITE: Option<(Asset, Powers)> = Some((Asset::Interrupts, Powers::WRITE));

/// A row; the outcomes are those of no isolation, of guest_memfd and of a vault.
const fn row(id: &'static str, what: &'static str, power: Option<(Asset, Powers)>, outcomes: [Outcome; 3]) -> Row {
    Row { id, what, power, outcomes }
}

const NO_KVM: Outcome = Absent("the VMM has no descriptor of KVM's that leads to the guest");
const UNMAPPABLE: Outcome = Refused("not found", "no process can read or map a guest_memfd");
const ELSEWHERE: Outcome = Refused("not found", "the private memory is in another process");
const NO_VAULT: Outcome = Absent("there is no vault");
const NOT_DUMPABLE: &str = "the vault is not dumpable";

pub const TABLES: &[Table] = &[
    Table {
        title: "A hostile VMM through the contract",
        text: "What the library itself refuses, whoever asks. That a request is answered with `Done` when nothing was \
               converted has no row of its own: there is no such call, only answers that conversions have made.",
        party: Some(Party::VmmProcess),
        rows: &[
            row("view-read", "read the secret through the shared view", MEMORY_READ, [VIEW; 3]),
            row("view-write", "write to the secret's page through the shared view", MEMORY_WRITE, [VIEW; 3]),
            row("view-straddle", "read from a shared page into the private one behind it", MEMORY_READ, [VIEW; 3]),
            row(
                "convert-unasked",
                "convert the secret's page, for which the guest has not asked",
                MEMORY_STEER,
                [NOT_ASKED; 3],
            ),
            row(
                "convert-other",
                "convert the secret's page when the guest asks for another one",
                MEMORY_STEER,
                [NOT_ASKED; 3],
            ),
            row("convert-vcpu", "convert what a vCPU asks for on behalf of another vCPU", MEMORY_STEER, [NOT_ASKED; 3]),
            row("convert-again", "convert a second time what was asked for once", MEMORY_STEER, [NOT_ASKED; 3]),
            row("answer-other", "answer with another VM's conversion, of something else", MEMORY_STEER, [PROTOCOL; 3]),
            row(
                "answer-foreign",
                "answer with another VM's conversion, of the same pages",
                MEMORY_STEER,
                [PROTOCOL; 3],
            ),
            row(
                "answer-stale",
                "answer with the VM's own conversion from an earlier request, of which the guest was told that it is refused",
                MEMORY_STEER,
                [PROTOCOL; 3],
            ),
            row(
                "run-unanswered",
                "run a vCPU that waits for an answer",
                MEMORY_STEER,
                [Refused("Protocol", "a question is answered first"); 3],
            ),
            row(
                "inject",
                "inject every vector and every other event into a guest that accepts none",
                INTERRUPTS_WRITE,
                [Refused("InjectionRefused", "only vectors from 32 on that the guest accepts pass"); 3],
            ),
            row(
                "interrupt-fd",
                "ask for a descriptor that interrupts, for every vector, of a guest that accepts one",
                None,
                [Open("just that one is given"); 3],
            ),
            row(
                "inject-accepted",
                "inject every vector into a guest that accepts three",
                None,
                [Open("just these three pass, as the guest wants"); 3],
            ),
        ],
    },
    Table {
        title: "A hostile VMM in its own process",
        text: "Page by page, for the secret. The guest's memory is whatever this process has open or mapped.",
        party: Some(Party::VmmProcess),
        rows: &[
            row(
                "own-files",
                "read, map and reopen every file of memory in `/proc/self/fd`",
                MEMORY_READ,
                [Open("the private file is among them"), UNMAPPABLE, ELSEWHERE],
            ),
            row(
                "own-mappings",
                "read every mapping through `/proc/self/mem`",
                MEMORY_READ,
                [Open("the guest's window shows it"), UNMAPPABLE, ELSEWHERE],
            ),
            row(
                "own-core",
                "read those mappings that a core dump of the VMM has",
                MEMORY_READ,
                [Open("the guest's window is in a core dump"), UNMAPPABLE, ELSEWHERE],
            ),
        ],
    },
    Table {
        title: "A hostile VMM around the library",
        text: "KVM's ioctls on every descriptor that the VMM's process finds in itself. The guest holds secrets in R12 to \
               R15, in a floating-point register and in an MSR too.",
        party: Some(Party::VmmProcess),
        rows: &[
            row("get-regs", "`KVM_GET_REGS`", REGISTERS_READ, REGISTERS),
            row("get-sregs", "`KVM_GET_SREGS`", REGISTERS_READ, REGISTERS),
            row("get-fpu", "`KVM_GET_FPU`", REGISTERS_READ, REGISTERS),
            row("get-xsave", "`KVM_GET_XSAVE`", REGISTERS_READ, REGISTERS),
            row("get-msrs", "`KVM_GET_MSRS`", REGISTERS_READ, REGISTERS),
            row("get-debugregs", "`KVM_GET_DEBUGREGS`", REGISTERS_READ, REGISTERS),
            row("get-lapic", "`KVM_GET_LAPIC`", REGISTERS_READ, [NO_APIC, NO_APIC, NO_KVM]),
            row("get-events", "`KVM_GET_VCPU_EVENTS`", REGISTERS_READ, REGISTERS),
            row(
                "set-regs",
                "`KVM_SET_REGS`, so that the guest reports its secret instead of its count",
                MEMORY_STEER,
                [STEERED, STEERED, NO_KVM],
            ),
            row(
                "single-step",
                "`KVM_SET_GUEST_DEBUG`, one instruction at a time",
                REGISTERS_STEER,
                [Open("it stops after each"), Open("it stops after each"), NO_KVM],
            ),
            row("raw-interrupt", "`KVM_INTERRUPT` with a vector that the guest does not accept", INTERRUPTS_WRITE, RAW),
            row("raw-nmi", "`KVM_NMI`", INTERRUPTS_WRITE, RAW),
            row("raw-msi", "`KVM_SIGNAL_MSI` with a vector that the guest does not accept", INTERRUPTS_WRITE, RAW),
            row("gsi-routing", "`KVM_SET_GSI_ROUTING` to such a vector", INTERRUPTS_WRITE, RAW),
            row("raw-smi", "`KVM_SMI`", INTERRUPTS_WRITE, RAW),
            row(
                "slot-overlap",
                "a memory slot of the VMM's own over the guest's",
                MEMORY_REMAP,
                [Refused("EEXIST", "slots do not overlap"), Refused("EEXIST", "slots do not overlap"), NO_KVM],
            ),
            row(
                "slot-alias",
                "the guest's private memory as a second slot at another address",
                MEMORY_REMAP,
                [
                    Open("each page has two addresses"),
                    Refused("EEXIST", "a page of a guest_memfd has one address"),
                    NO_KVM,
                ],
            ),
            row(
                "slot-remap",
                "delete the guest's slot and make one that has the VMM's bytes in place of the secret",
                MEMORY_REMAP,
                [Open("the guest computes with them"), Open("the guest computes with them"), NO_KVM],
            ),
            row(
                "slot-read-only",
                "delete the guest's slot and make one that the guest cannot write",
                MEMORY_REMAP,
                [
                    Open("the guest's writes come to the VMM instead"),
                    Refused("EINVAL", "KVM has no such slot with a guest_memfd"),
                    NO_KVM,
                ],
            ),
            row(
                "dirty-log",
                "`KVM_GET_DIRTY_LOG`",
                MEMORY_READ,
                [Open("which pages the guest writes"), Refused("EINVAL", "KVM keeps none for a guest_memfd"), NO_KVM],
            ),
        ],
    },
    Table {
        title: "A process of the same user",
        text: "The VMM, and its vault if it has one, are of an unprivileged user, and so is the attacker. It attacks the process \
               that holds the guest. Where the kernel restricts ptrace to parents (Yama), less is open than is said here.",
        party: Some(Party::SameUser),
        rows: &[
            row(
                "user/proc-mem",
                "read every mapping through `/proc/<pid>/mem`",
                MEMORY_READ,
                [READ, UNMAPPABLE, Refused("EACCES", NOT_DUMPABLE)],
            ),
            row(
                "user/vm-readv",
                "read every mapping by `process_vm_readv`",
                MEMORY_READ,
                [READ, UNMAPPABLE, Refused("EPERM", NOT_DUMPABLE)],
            ),
            row(
                "user/ptrace",
                "attach as a debugger, and so take the process over",
                MEMORY_STEER,
                [TAKEN_OVER, TAKEN_OVER, Refused("EPERM", NOT_DUMPABLE)],
            ),
            row(
                "user/getfd",
                "duplicate every descriptor by `pidfd_getfd`, and read and map what is memory",
                MEMORY_READ,
                [READ, UNMAPPABLE, Refused("EPERM", NOT_DUMPABLE)],
            ),
            row(
                "user/getfd-vcpu",
                "duplicate the vCPU's descriptor, and read registers",
                REGISTERS_READ,
                [OTHER_PROCESS, OTHER_PROCESS, Refused("EPERM", NOT_DUMPABLE)],
            ),
            row(
                "user/proc-fd",
                "reopen every file of memory in `/proc/<pid>/fd`",
                MEMORY_READ,
                [READ, UNMAPPABLE, Refused("EACCES", NOT_DUMPABLE)],
            ),
            row("user/proc-maps", "read `/proc/<pid>/maps`", None, [LAYOUT, LAYOUT, Refused("EACCES", NOT_DUMPABLE)]),
            row("user/proc-root", "follow `/proc/<pid>/root`", None, [ROOT, ROOT, Refused("EACCES", NOT_DUMPABLE)]),
            row("user/kcmp", "compare descriptors by `kcmp`", None, [KCMP, KCMP, Refused("EPERM", NOT_DUMPABLE)]),
            row(
                "user/core",
                "have a core dump written",
                None,
                [CORE, Open("without the private memory"), Refused("not dumpable", "the vault has none")],
            ),
            row("user/well", "disturb the guest by all of that", None, [WELL; 3]),
        ],
    },
    Table {
        title: "A vault that is about to start",
        text: "A process of the VMM's unprivileged user opens the vault's memory before the vault's first instruction; what is \
               opened then stays open. Where the kernel restricts ptrace to parents (Yama), nothing is open.",
        party: Some(Party::SameUser),
        rows: &[
            row(
                "start/child",
                "of a program that the user can read, started by the VMM",
                MEMORY_STEER,
                [NO_VAULT, NO_VAULT, Open("its memory, for as long as it lives")],
            ),
            row(
                "start/unreadable",
                "of a program that the user can execute and not read",
                MEMORY_STEER,
                [NO_VAULT, NO_VAULT, Refused("EACCES", "the kernel never makes the process dumpable")],
            ),
            row(
                "start/apart",
                "of its own user",
                MEMORY_STEER,
                [NO_VAULT, NO_VAULT, Refused("EACCES", "it is another user's")],
            ),
        ],
    },
    Table {
        title: "A VMM that attacks its vault",
        text: "The VMM's process reads the memory of the vault that holds its guest, by `/proc/<pid>/mem`: as an unprivileged \
               user that has started the vault, as one whose vault is of another user, and as root.",
        party: Some(Party::VmmProcess),
        rows: &[
            row(
                "vmm-child/proc-mem",
                "unprivileged, and the vault is its child",
                MEMORY_READ,
                [NO_VAULT, NO_VAULT, Refused("EACCES", NOT_DUMPABLE)],
            ),
            row(
                "vmm-apart/proc-mem",
                "unprivileged, and the vault is of its own user",
                MEMORY_READ,
                [NO_VAULT, NO_VAULT, Refused("EACCES", "it is another user's, and not dumpable")],
            ),
            row("vmm-root/proc-mem", "root", MEMORY_READ, [NO_VAULT, NO_VAULT, OpenInFile("the secret")]),
        ],
    },
    Table {
        title: "Root",
        text: "The same by a process with all privileges. Beyond these rows, root can change the kernel, and so do everything.",
        party: Some(Party::Root),
        rows: &[
            row(
                "root/proc-mem",
                "read every mapping through `/proc/<pid>/mem`",
                MEMORY_READ,
                [READ, UNMAPPABLE, OpenInFile("the secret")],
            ),
            row(
                "root/vm-readv",
                "read every mapping by `process_vm_readv`",
                MEMORY_READ,
                [READ, UNMAPPABLE, OpenInFile("the secret")],
            ),
            row(
                "root/ptrace",
                "attach as a debugger, and so take the process over",
                MEMORY_STEER,
                [TAKEN_OVER, TAKEN_OVER, TAKEN_OVER],
            ),
            row(
                "root/getfd",
                "duplicate every descriptor by `pidfd_getfd`, and read and map what is memory",
                MEMORY_READ,
                [READ, UNMAPPABLE, OpenInFile("the secret")],
            ),
            row(
                "root/getfd-vcpu",
                "duplicate the vCPU's descriptor, and read registers",
                REGISTERS_READ,
                [OTHER_PROCESS; 3],
            ),
            row(
                "root/proc-fd",
                "reopen every file of memory in `/proc/<pid>/fd`",
                MEMORY_READ,
                [READ, UNMAPPABLE, OpenInFile("the secret")],
            ),
            row("root/proc-maps", "read `/proc/<pid>/maps`", None, [LAYOUT; 3]),
            row("root/proc-root", "follow `/proc/<pid>/root`", None, [ROOT; 3]),
            row("root/kcmp", "compare descriptors by `kcmp`", None, [KCMP; 3]),
            row(
                "root/core",
                "have a core dump written",
                None,
                [
                    CORE,
                    Open("without the private memory"),
                    Refused("not dumpable", "but its memory can be read at any time"),
                ],
            ),
            row("root/well", "disturb the guest by all of that", None, [WELL; 3]),
        ],
    },
    Table {
        title: "A hostile guest",
        text: "What the VMM or its device gets; a guest beside it must notice nothing.",
        party: None,
        rows: &[
            row(
                "doorbell-garbage",
                "random accesses to the doorbell space, of all widths, by port and MSR",
                None,
                [Refused("UnknownDoorbell", "the vCPU has failed"); 3],
            ),
            row(
                "many-conversions",
                "convert a page back and forth, many times",
                None,
                [Refused("Done", "and the VM takes no more memory than before"); 3],
            ),
            row(
                "conversion-garbage",
                "ask for conversions of no pages, of too many, and of what is no memory",
                None,
                [Refused("Invalid", "the guest goes on, and nothing is converted"); 3],
            ),
            row(
                "device-race",
                "convert a page back and forth while a device reads and writes it",
                None,
                [Refused("shared bytes or an error", "never private bytes, and never a write to a private page"); 3],
            ),
            row("private-ring", "a virtqueue's descriptors in private memory", None, [NO_CHAIN; 3]),
            row("straddling-ring", "a virtqueue's descriptors that begin shared and end private", None, [NO_CHAIN; 3]),
            row("private-buffer", "a buffer in private memory", None, [VIEW; 3]),
            row("straddling-buffer", "a buffer that begins shared and ends private", None, [VIEW; 3]),
            row("endless-buffer", "a buffer of 4 GiB", None, [VIEW; 3]),
            row(
                "chain-loop",
                "a chain of descriptors that loops",
                None,
                [Refused("the chain ends", "after as many as the queue has"); 3],
            ),
            row("spin", "never leave", None, [Refused("Kicked", "the VMM's watchdog gets its vCPU back"); 3]),
            row("triple-fault", "an exception without a handler", None, [CRASHED; 3]),
            row("halt", "halt for ever", None, [Refused("Halted", "the VMM decides what to do"); 3]),
            row(
                "outside-memory",
                "touch what is no memory",
                None,
                [
                    Refused("MmioRefused", "with the address"),
                    Refused("Crashed", "KVM fetches the instruction from the shared side, and cannot say where it was"),
                    Refused("MmioRefused or Crashed", "as without a vault, by where private memory is"),
                ],
            ),
        ],
    },
    Table {
        title: "Deaths",
        text: "By `SIGKILL`, at random moments while the guest runs and converts.",
        party: None,
        rows: &[
            row(
                "kill-vault",
                "kill the process that holds the guest",
                None,
                [NOBODY_ELSE, NOBODY_ELSE, Refused("errors", "from every handle, at once; nothing is left")],
            ),
            row(
                "kill-vmm",
                "kill the VMM",
                None,
                [NOBODY_ELSE, NOBODY_ELSE, Refused("gone", "the vault does not outlive its VMM")],
            ),
        ],
    },
];

const VIEW: Outcome = Refused("ViewError::Private", "a private page is no part of the view");
const NOT_ASKED: Outcome = Refused("NotAsked", "a request is good once, for the vCPU and the pages that it names");
const PROTOCOL: Outcome = Refused("Protocol", "a conversion answers the one request that it was made for");
const REGISTERS: [Outcome; 3] = [Open("the guest's"), Open("the guest's"), NO_KVM];
const NO_APIC: Outcome = Refused("EINVAL", "the guest has none in the kernel");
const STEERED: Outcome = Open("the guest tells all of it");
const RAW: [Outcome; 3] = [Open("past the guard"), Open("past the guard"), NO_KVM];
const READ: Outcome = Open("the secret");
const TAKEN_OVER: Outcome = Open("and does what it could do");
const OTHER_PROCESS: Outcome = Refused("EIO", "KVM serves the process that made the VM");
const LAYOUT: Outcome = Open("its address space, none of its contents");
const ROOT: Outcome = Open("nothing of the guest's");
const KCMP: Outcome = Open("nothing of the guest's");
const CORE: Outcome = Open("when it crashes");
const WELL: Outcome = Refused("well", "it counts on, with its secrets as they were");
const NO_CHAIN: Outcome = Refused("the queue is not valid", "the device takes no queue that is not shared");
const CRASHED: Outcome = Refused("Crashed", "the vCPU has failed");
const NOBODY_ELSE: Outcome = Absent("the guest is in the VMM's own process");
