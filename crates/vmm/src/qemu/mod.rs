//! QEMU on x86-64: the `microvm` machine where it can, `q35` where persistent memory needs it.
//!
//! ```text
//! us                                            QEMU (own session, unprivileged, seccomp)
//!  qmp.sock    listening, made by us  ─ fd 10 ─► QMP: status, pause, quit, console, events
//!  agent.sock  listening, made by us  ─ fd 11 ─► virtio-serial port `offshoot.agent`
//!  vmm.log     opened by us           ─ fd 1,2 ► its own words
//! ```
//!
//! The sockets listen before QEMU exists, so connecting never waits or polls, and QEMU writes no folder.
//!
//! The guest's console goes to a ring of 64 KiB inside QEMU (`chardev ringbuf`) and from there to the console log
//! when somebody asks, and at the end. A file would let a guest fill the host's disk (a limit on the size of files
//! would hit its disks, too); a socket or pipe loses everything, or stops the guest, while no daemon reads. The ring
//! keeps the *last* words, costs no process and no wake-up, and lives as long as QEMU. Therefore QEMU does not leave
//! by itself when its guest has ended (`-no-shutdown`): it waits until its last words are saved and is then told to
//! quit. A guest that ends while no daemon runs waits for the next one, which then also learns why it ended.

mod args;
mod driver;
mod machine;
mod opts;
mod probe;
mod qmp;
mod shape;

pub use args::{CPU_KVM, CPU_TCG, TCG_CACHE, command_line};
pub use driver::{QemuConfig, QemuDriver};
pub use opts::{CommandLine, Opts, OptsError, read_opts};
pub use probe::QemuFacts;
