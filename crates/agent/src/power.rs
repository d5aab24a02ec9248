//! The machine's end.

use std::path::Path;

use rustix::system::{RebootCommand, reboot};

use crate::log;

/// Switches the machine off; everything worth keeping is on disk before.
///
/// Without ACPI the kernel knows no way to switch off and would halt with the VMM still running. Every VMM of ours is
/// told to end when its guest resets, so a reset is the end there.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    let has_acpi = Path::new("/sys/firmware/acpi/tables").exists();
    let command = if has_acpi {
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

/// Says why there is nothing left to do, and switches the machine off.
pub(crate) fn off_because(reason: impl std::fmt::Display) -> ! {
    log::fatal(reason);
    off()
}
