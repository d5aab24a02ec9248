//! A VMM without a processor, for tests and benchmarks: a program that takes QEMU's arguments, speaks QMP to the real
//! QEMU driver, and has a guest of a few KiB whose agent speaks the real protocol. A real daemon that is given this
//! program as its QEMU creates, starts, enters and stops VMs within milliseconds.
//!
//! ```text
//!   qmp.sock ───► qmp ──────► machine (running, paused, ended; console; disks)
//!                  │ power button    ▲ holds the port still     ▲ poweroff, reboot, panic
//!                  ▼                 │                          │
//!   agent.sock ─► port ─► service ─► guest ─────────────────► process ◄─ program (what an argument list means)
//! ```
//!
//! [`firecracker`] and [`cloud_hypervisor`] are the same behind the other drivers: the same guest, other programs. [`prying`] is
//! a VMM that its guest has taken over, behind each of them.
//!
//! What it ignores: devices, kernel and initramfs beyond their existence, and files in the guest. What it can be told:
//! [`Behaviour`] in its environment makes it fail in ways that a real QEMU won't, and commands in the guest
//! (`poweroff`, `reboot`, `echo c > /proc/sysrq-trigger`, anything below `/nonexistent`) end or refuse what they would
//! end or refuse in a real guest.

mod api;
mod arguments;
mod behaviour;
pub mod cloud_hypervisor;
pub mod firecracker;
mod guest;
mod machine;
mod port;
mod process;
mod program;
pub mod prying;
mod qmp;
mod service;
mod vsock;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::net::UnixListener as StdListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use offshoot_sys::process::inherited_fd;
use tokio::net::UnixListener;

pub use arguments::{Arguments, ArgumentsError};
pub use behaviour::{Behaviour, BehaviourError};

use guest::Guest;
use machine::{End, Machine};

/// What the fake says to `-version`, `-machine help`, `-accel help` and `-device help`; `None` for other arguments.
pub fn answer_to_question(args: &[OsString]) -> Option<&'static str> {
    let words: Vec<_> = args.iter().filter_map(|arg| arg.to_str()).collect();
    match words.as_slice() {
        ["-version"] => Some("QEMU emulator version 7.2.0 (fake)\n"),
        ["-machine", "help"] => {
            Some("Supported machines are:\nmicrovm    microvm (i386)\nq35    Standard PC\n")
        }
        // It runs as well, or as little, on every host.
        ["-accel", "help"] => Some("Accelerators supported in QEMU binary:\ntcg\nkvm\n"),
        ["-device", "help"] => {
            Some("name \"virtio-pmem-pci\", bus PCI\nname \"vhost-user-fs-pci\", bus PCI\n")
        }
        _ => None,
    }
}

/// Runs the machine until it is told to quit or to die; returns the status to exit with.
///
/// Call it once, at the start of the program: it takes its sockets from the descriptors that the arguments name. One
/// thread does everything, so that a thousand of them fit into a small host.
///
/// # Errors
/// When a descriptor is no listening socket.
pub fn run(arguments: Arguments, behaviour: &Behaviour) -> io::Result<i32> {
    let listening = |fd| -> io::Result<StdListener> {
        let socket = StdListener::from(inherited_fd(fd)?);
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let qmp = listening(arguments.qmp)?;
    let agent = arguments.agent.map(listening).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let machine = Arc::new(Machine::new(&behaviour.console, arguments.disks));
        let guest = Arc::new(Guest::new(Arc::clone(&machine)));
        // As after a crash: no event, no clean-up, nothing flushed.
        after(behaviour.die_after, || std::process::abort());
        let ending = Arc::clone(&machine);
        after(behaviour.power_off_after, move || ending.end(End::PowerOff));
        if let Some(agent) = agent {
            let agent = UnixListener::from_std(agent)?;
            tokio::spawn(port::serve(agent, Arc::clone(&machine), Arc::clone(&guest)));
        }
        qmp::serve(&UnixListener::from_std(qmp)?, &machine, &guest, behaviour).await
    })
}

/// The whole program of a fake that answers `--version` and runs with its arguments.
pub fn main_of(version: &str, run: impl FnOnce(&[OsString], Behaviour) -> io::Result<i32>) -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args == ["--version"] {
        return match io::stdout().write_all(version.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let behaviour = std::env::var(Behaviour::VARIABLE).unwrap_or_default();
    let behaviour: Behaviour = match behaviour.parse() {
        Ok(behaviour) => behaviour,
        Err(error) => return complain(&format!("{error}")),
    };
    if behaviour.exit {
        return complain("told to exit at start");
    }
    match run(&args, behaviour) {
        Ok(status) => u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => complain(&error.to_string()),
    }
}

/// One line on standard error.
fn complain(words: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "offshoot-fake-vmm: {words}");
    ExitCode::FAILURE
}

/// Does something later, if it is to be done at all.
fn after(wait: Option<Duration>, act: impl FnOnce() + Send + 'static) {
    if let Some(wait) = wait {
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            act();
        });
    }
}
