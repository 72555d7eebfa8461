//! A vault for programs whose `main` cannot begin with [`vault::init`](cvm_backend_kvm::vault::init), and the launcher of vaults
//! that run under their own user.

use cvm_backend_kvm::backend::chain;
use cvm_backend_kvm::vault::{self, Launcher};
use lexopt::{Arg, Parser, ValueExt};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
Vaults for virtual machine monitors (VMMs), see the crate cvm-backend-kvm.

A VMM that starts its own vaults needs no options here. To run vaults under a user of their own:

  cvm-vault --listen SOCKET --user UID [--user UID]... [--most N] [--device FILE]
      Listens on SOCKET, and starts a vault for each VMM that connects, if its user is one of these

  cvm-vault --connection [--device FILE]
      Is the vault of the VMM that is connected to standard input, a SOCK_SEQPACKET socket: for
      socket units of systemd with Accept=yes

  --most N         The most vaults at a time [default: 64]
  --device FILE    The KVM device [default: /dev/kvm]
";

enum Command {
    Help,
    Connection(PathBuf),
    Listen(Launcher),
}

fn parse(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let (mut listen, mut connection, mut device) = (None, false, PathBuf::from("/dev/kvm"));
    let (mut users, mut most) = (Vec::new(), 64);
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("listen") => listen = Some(PathBuf::from(parser.value()?)),
            Arg::Long("connection") => connection = true,
            Arg::Long("device") => device = parser.value()?.into(),
            Arg::Long("user") => users.push(parser.value()?.parse()?),
            Arg::Long("most") => most = parser.value()?.parse()?,
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help),
            other => return Err(other.unexpected()),
        }
    }
    match (listen, connection) {
        (None, true) => Ok(Command::Connection(device)),
        (Some(_), false) if users.is_empty() => {
            Err("--listen takes the users that are given vaults: --user UID".into())
        }
        (Some(socket), false) => Ok(Command::Listen(Launcher { socket, device, users, most })),
        _ => Err("it takes either --listen or --connection; a VMM starts it without options of its own".into()),
    }
}

fn main() -> ExitCode {
    vault::init();
    let failed = match parse(Parser::from_env()) {
        // There is nobody to tell if nobody reads it.
        Ok(Command::Help) => return std::io::stdout().write_all(HELP.as_bytes()).map_or(1.into(), |()| 0.into()),
        Ok(Command::Connection(device)) => vault::serve(&device),
        Ok(Command::Listen(launcher)) => {
            let Err(error) = launcher.run();
            chain(&error)
        }
        Err(error) => error.to_string(),
    };
    let _ = writeln!(std::io::stderr(), "cvm-vault: {failed}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Command, String> {
        parse(Parser::from_args(words)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_launcher_names_its_socket_and_its_users() {
        let Ok(Command::Listen(launcher)) = parsed(&["--listen", "/run/s", "--user", "7", "--user=8", "--most", "2"])
        else {
            panic!("it is not parsed");
        };
        assert_eq!((launcher.users, launcher.most), (vec![7, 8], 2));
        assert_eq!((launcher.socket, launcher.device), ("/run/s".into(), "/dev/kvm".into()));
    }

    #[test]
    fn what_is_missing_or_too_much_is_refused() {
        assert!(
            matches!(parsed(&["--connection", "--device", "/dev/k"]), Ok(Command::Connection(device)) if device == *"/dev/k")
        );
        for words in [
            &[][..],
            &["--listen"],
            &["--listen", "/run/s"],
            &["--listen", "/run/s", "--user", "root"],
            &["--listen", "/run/s", "--user", "7", "--connection"],
            &["--user", "7"],
            &["/dev/kvm"],
        ] {
            assert!(parsed(words).is_err(), "{words:?}");
        }
    }
}
