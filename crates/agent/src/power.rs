//! The machine's end.

use std::path::Path;

use rustix::system::{RebootCommand, reboot};

use crate::{command_line, log};

/// Switches the machine off; everything worth keeping is on disk before.
///
/// Without ACPI, and on Firecracker with it, the kernel knows no way to switch off and would halt with the VMM still
/// running. Every VMM of ours is told to end when its guest resets, so a reset is the end there.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    let has_acpi = Path::new("/sys/firmware/acpi/tables").exists();
    let command = if has_acpi && !command_line::has(command_line::OFF_BY_RESET) {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    if let Err(error) = reboot(command) {
        log::fatal(format_args!("cannot switch the machine off: {error}"));
    }
    loop {
        std::thread::park();
    }
}

/// Says why there is nothing left to do, and fails as a machine does: a kernel whose PID 1 ends panics, so that the host
/// does not take it for an orderly end. From the agent the way there leads over PID 1, which reaps it.
pub(crate) fn fail(reason: impl std::fmt::Display) -> ! {
    log::fatal(reason);
    rustix::fs::sync();
    std::process::exit(1)
}
