//! A command in "L1": a small VM whose KVM has the whole confidential-VM interface.
//!
//! QEMU emulates the VM, nested virtualization included, so neither `/dev/kvm` nor any special
//! hardware is needed. The VM's root is this machine's root, read-only over 9p: a binary built
//! here runs there as it is.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::cpio::Archive;
use crate::error::{Context, Error, Result};
use crate::program::{OutputError, note, print_bytes};
use crate::{l1_kernel, tools, workspace};

/// The exit status when the time is up, as `timeout(1)` has it.
const TIMED_OUT: u8 = 124;

/// The rate of the VM's time stamp counter when this machine does not tell its own.
const FALLBACK_KHZ: u64 = 2_000_000;

/// What the VM's init writes to the second serial port before the exit status.
const EXIT_MARK: &str = "l1-exit ";

const INIT: &[u8] = include_bytes!("../l1/init");

/// Run a command in a small VM whose KVM has the whole confidential-VM interface.
///
/// The VM's root is this machine's root, read-only; /tmp and /run are fresh. The working directory
/// is writable: DIR with --work-dir, where `l1-dmesg`, `l1-psp` (the log of the model of AMD's secure
/// processor) and `l1-tdx` (the log of the model of the TDX module) are left too, otherwise an empty one
/// in the VM's memory. Variables named CVM_*, PROPTEST_*, RUST_LOG and CARGO_MANIFEST_DIR are passed on.
/// The exit status is the command's, or 124 when it took too long.
#[derive(Args)]
pub struct L1 {
    /// The VM's kernel [default: $CVM_L1_KERNEL, then what `cargo xtask l1-kernel` built]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The VM's processor, which decides what its KVM offers
    #[arg(short, long, value_enum, default_value_t = Processor::Amd)]
    processor: Processor,
    /// Give up after this time
    #[arg(short, long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// The VM's memory, as QEMU writes it
    #[arg(short, long, value_name = "MEM", default_value = "2G")]
    memory: String,
    /// The VM's number of CPUs
    #[arg(short = 's', long, value_name = "CPUS", default_value_t = 1)]
    cpus: u8,
    /// The directory of this machine that is the command's working directory
    #[arg(short, long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// An argument for the kernel, such as ccp.scramble=1; may be given more than once
    #[arg(short = 'a', long = "kernel-arg", value_name = "ARG", allow_hyphen_values = true)]
    kernel_args: Vec<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The processor of the VM. A KVM of AMD's has SEV, SEV-ES and SEV-SNP, one of Intel's has TDX.
///
/// With five levels of nested paging the kernel's model of an SEV processor tells private and shared accesses to one page
/// apart, as hardware does; see `xtask/l1/README.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Processor {
    /// AMD's, with SEV-ES and SEV-SNP guests as on hardware
    Amd,
    /// AMD's, with guests that need no handler for #VC, and whose C-bit is not enforced
    AmdLenient,
    /// Intel's, with a TDX module
    Intel,
    /// Intel's with four levels of extended page tables: guests have 48 bits of physical address
    #[value(name = "intel-4-level")]
    Intel4Level,
}

impl Processor {
    /// The processor as QEMU writes it. SEV and TDX both count on 52 bits of physical address.
    fn qemu(self) -> &'static str {
        match self {
            Self::Amd => "max,+svm,+npt,+la57,family=25,model=1,stepping=1,phys-bits=52",
            Self::AmdLenient => "max,+svm,+npt,-la57,family=25,model=1,stepping=1,phys-bits=52",
            Self::Intel => "max,vendor=GenuineIntel,+svm,+npt,+la57,family=6,model=173,stepping=1,phys-bits=52",
            Self::Intel4Level => "max,vendor=GenuineIntel,+svm,+npt,-la57,family=6,model=173,stepping=1,phys-bits=52",
        }
    }

    /// What the kernel has to be told for it.
    fn kernel_args(self) -> &'static str {
        match self {
            // An exception without a handler is a double fault.
            Self::Amd => " kvm_amd.fakepsp_guest=2",
            Self::AmdLenient => "",
            Self::Intel | Self::Intel4Level => " kvm_intel.tdx=1",
        }
    }
}

impl L1 {
    /// Runs the command and passes its exit status on.
    pub fn run(&self) -> Result<ExitCode> {
        let vm = self.start()?;
        match vm.wait(Duration::from_secs(self.timeout))? {
            End::Exit(status) => Ok(ExitCode::from(status)),
            End::TimedOut => {
                note(format_args!("l1: no end within {} s", self.timeout));
                Ok(ExitCode::from(TIMED_OUT))
            }
            End::Lost => {
                Err(Error::new("the VM ended before the command did; what QEMU or the kernel said last is above"))
            }
        }
    }

    fn start(&self) -> Result<Vm> {
        let qemu = tools::find("qemu-system-x86_64", "qemu-system-x86")?;
        let initramfs = self.initramfs()?;
        let kernel = self.kernel()?;
        let mut append = format!(
            // Where this machine is busy the kernel's check finds that the timer does not tick, and gives up.
            "console=ttyS0 quiet mitigations=off panic=-1 oops=panic reboot=t no_timer_check tsc_early_khz={}",
            // Stands in for the calibration that a VM without ACPI cannot do.
            tsc_khz().unwrap_or(FALLBACK_KHZ),
        );
        append.push_str(self.processor.kernel_args());
        for more in &self.kernel_args {
            append.extend([" ", more]);
        }

        let mut shares = vec![share("root", Path::new("/"), ",readonly=on,multidevs=remap")];
        if let Some(directory) = &self.work_dir {
            let directory = fs::canonicalize(directory).context(|| format!("--work-dir {}", directory.display()))?;
            shares.push(share("work", &directory, ""));
            append.push_str(" l1_work_dir=yes");
        }

        // QEMU must not outlive this process, however it ends.
        let mut command = Command::new(tools::find("setpriv", "util-linux")?);
        command.args(["--pdeathsig", "KILL", "--"]).arg(qemu);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", self.processor.qemu()]);
        // The firmware's table of processors, all that a VM without ACPI has, names one of each socket.
        command.args(["-m", &self.memory, "-smp", &format!("{0},sockets={0}", self.cpus)]);
        command.args(["-append", &append, "-initrd", "/dev/stdin", "-kernel"]);
        command.arg(kernel);
        command.args(["-serial", "file:/dev/stdout", "-serial", "file:/dev/stderr"]);
        for share in shares {
            command.arg("-virtfs").arg(share);
        }
        command.stdin(initramfs);
        Vm::start(command)
    }

    fn kernel(&self) -> Result<PathBuf> {
        let built = l1_kernel::path();
        let chosen = self.kernel.clone();
        let kernel =
            chosen.or_else(|| env::var_os("CVM_L1_KERNEL").map(PathBuf::from)).unwrap_or_else(|| built.clone());
        if kernel.is_file() {
            Ok(kernel)
        } else if kernel == built {
            Err(Error::new(
                "no kernel for L1; build it once with `cargo xtask l1-kernel`, \
                 or name one with --kernel or $CVM_L1_KERNEL",
            ))
        } else {
            Err(Error::new(format!("no kernel at {}", kernel.display())))
        }
    }

    /// The VM's first root file system, in a file that is gone with its last user.
    fn initramfs(&self) -> Result<File> {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "host", "proc", "sys"] {
            archive.directory(directory);
        }
        archive.program("bin/busybox", &static_busybox()?);
        archive.program("init", INIT);
        archive.program("command", &self.script());

        let write = || {
            let mut file = tempfile::tempfile()?;
            file.write_all(&archive.finish())?;
            file.rewind()?;
            Ok::<_, io::Error>(file)
        };
        write().context(|| format!("writing the VM's initramfs to a temporary file in {}", env::temp_dir().display()))
    }

    /// The shell script that runs the command as it would run here.
    fn script(&self) -> Vec<u8> {
        let mut script = b"cd /tmp/l1\n".to_vec();
        let fixed = [("HOME", "/tmp"), ("LANG", "C.UTF-8"), ("RUST_BACKTRACE", "1")];
        let fixed = fixed.map(|(name, value)| (name.into(), value.into()));
        for (name, value) in fixed.into_iter().chain(env::vars_os().filter(is_passed_on)) {
            script.extend([b"export ", name.as_bytes(), b"=", &quoted(&value), b"\n"].concat());
        }
        script.extend_from_slice(b"exec");
        let (program, arguments) = self.command.split_first().map_or((None, &[][..]), |(p, rest)| (Some(p), rest));
        for word in program.map(resolved).iter().chain(arguments) {
            script.push(b' ');
            script.extend(quoted(word));
        }
        script.push(b'\n');
        script
    }
}

/// How a VM ended.
enum End {
    /// The command ended with this status.
    Exit(u8),
    /// The time was up.
    TimedOut,
    /// The VM ended without saying how the command did.
    Lost,
}

/// A running VM; it is killed when dropped.
struct Vm {
    qemu: Child,
    console: Receiver<Result<()>>,
    status: Receiver<Option<u8>>,
}

impl Vm {
    /// Starts QEMU with the VM's console on its standard output and the serial port for the exit
    /// status on its standard error, where its own complaints are too.
    fn start(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut qemu = command.spawn().context(|| "starting QEMU".into())?;
        let missing = || Error::new("QEMU started without its pipes");
        let output = qemu.stdout.take().ok_or_else(missing)?;
        let errors = qemu.stderr.take().ok_or_else(missing)?;

        let (done, console) = mpsc::channel();
        thread::spawn(move || done.send(forward_console(output, print_bytes)));
        let (ended, status) = mpsc::channel();
        thread::spawn(move || ended.send(forward_errors(errors)));
        Ok(Self { qemu, console, status })
    }

    /// Waits for the end while the other threads forward what comes out.
    fn wait(mut self, limit: Duration) -> Result<End> {
        let console = self.console.recv_timeout(limit);
        self.kill();
        if matches!(console, Err(RecvTimeoutError::Timeout)) {
            // What was on its way is still worth seeing.
            let _ = self.console.recv();
            return Ok(End::TimedOut);
        }
        if let Ok(forwarded) = console {
            forwarded?;
        }
        let status = self.status.recv().ok().flatten();
        Ok(status.map_or(End::Lost, End::Exit))
    }

    fn kill(&mut self) {
        // Both fail only when QEMU is gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Copies the VM's console to the standard output, line by line, without the kernel's farewell.
fn forward_console(console: impl Read, print: impl Fn(&[u8]) -> Result<(), OutputError>) -> Result<()> {
    let mut console = BufReader::new(console);
    let mut line = Vec::new();
    while console.read_until(b'\n', &mut line).context(|| "reading the VM's console".into())? > 0 {
        print(&without_kernel_noise(&line))?;
        line.clear();
    }
    Ok(())
}

/// Copies QEMU's complaints to the standard error; the result is the command's exit status, when
/// there was one.
fn forward_errors(errors: impl Read) -> Option<u8> {
    let mut status = None;
    for line in BufReader::new(errors).lines().map_while(io::Result::ok) {
        match line.trim_end().strip_prefix(EXIT_MARK) {
            Some(number) => status = number.parse().ok(),
            None => note(line),
        }
    }
    status
}

/// The part of a line of the console that the command wrote, as it wrote it.
fn without_kernel_noise(line: &[u8]) -> Vec<u8> {
    // The kernel has the KVM of both vendors, and that of the other one complains.
    const NOISE: [&str; 5] = [
        "] reboot: ",
        "] Kernel compiled without mitigations",
        "] kvm_amd: CPU 0 isn't AMD",
        "] kvm_intel: VMX not supported",
        "] virt/tdx: TDX not supported",
    ];
    let text = String::from_utf8_lossy(line);
    if let Some(end) = NOISE.iter().find_map(|noise| text.find(noise)) {
        // The kernel does not start a new line when the command left one unfinished.
        let start = text[..end].rfind('[').unwrap_or(0);
        return text[..start].as_bytes().to_vec();
    }
    match line.strip_suffix(b"\r\n") {
        Some(line) => [line, b"\n"].concat(),
        None => line.to_vec(),
    }
}

/// QEMU's description of a directory of this machine for the VM.
fn share(tag: &str, path: &Path, options: &str) -> OsString {
    let mut share = OsString::from("local,path=");
    for part in path.as_os_str().as_bytes().split_inclusive(|&b| b == b',') {
        share.push(OsStr::from_bytes(part));
        if part.ends_with(b",") {
            share.push(",");
        }
    }
    share.push(format!(",mount_tag={tag},security_model=none{options}"));
    share
}

/// Whether the command sees this variable too.
fn is_passed_on((name, value): &(OsString, OsString)) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let prefixed = ["CVM_", "PROPTEST_"]
        .iter()
        .any(|prefix| name.starts_with(prefix) && name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()));
    match name {
        "PATH" | "RUST_LOG" => true,
        // Under `cargo xtask` it is this crate's, which says nothing about the command.
        "CARGO_MANIFEST_DIR" => value != workspace::XTASK,
        _ => prefixed,
    }
}

/// `program` as it is found from the VM's working directory: a path relative to this one's is made absolute.
fn resolved(program: &OsString) -> OsString {
    let path = Path::new(program);
    let is_relative_path = path.is_relative() && path.components().count() > 1;
    if !is_relative_path {
        return program.clone();
    }
    std::path::absolute(path).map_or_else(|_| program.clone(), Into::into)
}

/// `word` as one word of a shell script.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            _ => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// The first busybox on PATH, which has to run where there is no library.
fn static_busybox() -> Result<Vec<u8>> {
    const PACKAGE: &str = "busybox-static";
    let path = tools::find("busybox", PACKAGE)?;
    let program = fs::read(&path).context(|| format!("reading {}", path.display()))?;
    if needs_loader(&program) {
        return Err(Error::new(format!(
            "{} is not statically linked; on Debian: apt-get install {PACKAGE}",
            path.display()
        )));
    }
    Ok(program)
}

/// Whether a 64-bit ELF program asks for a dynamic loader.
fn needs_loader(program: &[u8]) -> bool {
    const INTERPRETER: u64 = 3;
    let number = |at: usize, size: usize| -> Option<u64> {
        let bytes = program.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    };
    let header = |index: u64| -> Option<u64> {
        let at = number(0x20, 8)?.checked_add(index * number(0x36, 2)?)?;
        number(at.try_into().ok()?, 4)
    };
    (0..number(0x38, 2).unwrap_or(0)).any(|index| header(index) == Some(INTERPRETER))
}

/// The rate of this machine's time stamp counter, which is the VM's too.
fn tsc_khz() -> Option<u64> {
    let cpus = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpus.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    Some((mhz * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_farewell_is_cut_off_and_the_commands_last_words_stay() {
        let cases: [(&[u8], &[u8]); 6] = [
            (b"plain\r\n", b"plain\n"),
            (b"own return\r\r\n", b"own return\r\n"),
            (b"unfinished", b"unfinished"),
            (b"[    2.5] reboot: Restarting system\r\n", b""),
            (b"[    0.5] kvm_amd: CPU 0 isn't AMD or Hygon\r\n", b""),
            (b"last words[    2.5] reboot: Restarting system\r\n", b"last words"),
        ];
        for (line, expected) in cases {
            assert_eq!(without_kernel_noise(line), expected);
        }
    }

    #[test]
    fn a_quoted_word_is_one_word_for_a_shell() {
        let word = "it's $HOME `x` \"y\"\n*";
        let script = [b"printf %s ".to_vec(), quoted(OsStr::new(word))].concat();
        let shell = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), word);
    }

    #[test]
    fn a_relative_program_is_found_from_elsewhere_too() {
        let here = env::current_dir().unwrap();
        assert_eq!(resolved(&"target/debug/program".into()), here.join("target/debug/program"));
        assert_eq!(resolved(&"uname".into()), "uname");
        assert_eq!(resolved(&"/bin/uname".into()), "/bin/uname");
    }

    #[test]
    fn variables_for_the_command_are_passed_on_and_others_are_not() {
        let is_passed_on = |name: &str, value: &str| is_passed_on(&(name.into(), value.into()));
        assert!(is_passed_on("CVM_BACKEND", "sev"));
        assert!(is_passed_on("PROPTEST_CASES", "8"));
        assert!(is_passed_on("CARGO_MANIFEST_DIR", "/some/crate"));
        assert!(!is_passed_on("CARGO_MANIFEST_DIR", workspace::XTASK));
        assert!(!is_passed_on("CVM_ODD NAME", "1"));
        assert!(!is_passed_on("LD_PRELOAD", "x.so"));
    }

    #[test]
    fn a_comma_in_a_path_is_doubled_for_qemu() {
        assert_eq!(share("work", Path::new("/a,b"), ""), "local,path=/a,,b,mount_tag=work,security_model=none");
    }

    #[test]
    fn a_test_program_needs_a_loader_and_garbage_does_not() {
        let this = fs::read(env::current_exe().unwrap()).unwrap();
        assert!(needs_loader(&this));
        assert!(!needs_loader(&this[..0x38]));
        assert!(!needs_loader(&[0xff; 256]));
    }

    #[test]
    fn a_reader_that_closed_the_pipe_ends_the_forwarding_as_what_it_is() {
        let closed = |_: &[u8]| Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        let error = forward_console(&b"one\ntwo\n"[..], closed).unwrap_err();
        assert!(matches!(&error, Error::Output(error) if error.is_closed()), "{error:?}");
    }

    #[test]
    fn the_last_exit_mark_is_the_exit_status() {
        assert_eq!(forward_errors(&b"l1-exit 7\r\n"[..]), Some(7));
        assert_eq!(forward_errors(&b""[..]), None);
    }
}
