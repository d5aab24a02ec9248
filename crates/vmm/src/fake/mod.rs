//! A VMM without a guest, for tests: a program that takes QEMU's arguments and speaks QMP, so that the real QEMU
//! driver runs it as a real process. It ignores devices, and can be told to fail in ways that a real QEMU won't.
//!
//! ```text
//! QemuDriver { program: offshoot-fake-vmm, env: [("OFFSHOOT_FAKE_VMM", "refuse=stop")] }
//! ```
//!
//! The agent's socket is accepted and read, and nothing is answered: an agent in this process is to come.

mod arguments;
mod behaviour;
mod server;

pub use arguments::{Arguments, ArgumentsError, read_opts};
pub use behaviour::{Behaviour, BehaviourError};
pub use server::serve;

/// What the fake says to `-version`, `-machine help`, `-accel help` and `-device help`; `None` for other arguments.
pub fn answer_to_question(args: &[std::ffi::OsString]) -> Option<&'static str> {
    let words: Vec<_> = args.iter().filter_map(|arg| arg.to_str()).collect();
    match words.as_slice() {
        ["-version"] => Some("QEMU emulator version 7.2.0 (fake)\n"),
        ["-machine", "help"] => {
            Some("Supported machines are:\nmicrovm    microvm (i386)\nq35    Standard PC\n")
        }
        ["-accel", "help"] => Some("Accelerators supported in QEMU binary:\ntcg\n"),
        ["-device", "help"] => {
            Some("name \"virtio-pmem-pci\", bus PCI\nname \"vhost-user-fs-pci\", bus PCI\n")
        }
        _ => None,
    }
}
