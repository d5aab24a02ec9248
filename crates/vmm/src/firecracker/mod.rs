//! Firecracker on x86-64: a machine of a few virtio devices, put together by requests to its API, one after another.
//!
//! ```text
//! us                                            Firecracker (own session, unprivileged, its own seccomp)
//!  own/api.sock    made by it         ◄───────── its HTTP API: configure, start, pause, resize
//!  own/agent.sock  made by it         ◄───────── vsock as a Unix socket
//!  console         a pipe of ours     ─ fd 1 ──► the guest's serial port
//!  vmm.log         memory of ours     ─ fd 2, 13 ► its own words
//! ```
//!
//! It makes its sockets itself, so it gets a folder for them; who listens is looked at before anything is said. It opens
//! a TAP by name, so it runs in the TAP's network namespace and owns it.
//!
//! Its machine cannot be switched off, only reset: then the process ends. Guests are told so by a kernel parameter
//! ([`OFF_BY_RESET`]). Its disks have no serials of ours; guests are told the order ([`DISKS`]).

mod driver;
mod machine;
mod probe;
mod requests;

pub use driver::{FirecrackerConfig, FirecrackerDriver};
pub use probe::FirecrackerFacts;
pub use requests::{
    Action, ActionType, Balloon, BootSource, DISKS, Drive, DrivePath, MachineConfig, NetworkInterface,
    Nothing, OFF_BY_RESET, Pmem, Request, VmState, Vsock, requests,
};
