//! Firecracker on x86-64: a machine of a few virtio devices, put together by requests to its API, one after another.
//!
//! ```text
//! us                                            Firecracker (own session, unprivileged, its own seccomp)
//!  own/api.sock    made by it         ◄───────── its HTTP API: configure, start, pause, resize
//!  own/agent.sock  made by it         ◄───────── vsock as a Unix socket
//!  own/disk-…      links of ours                 its disks, by paths that are the same for all VMs
//!  memory, state   a saved guest      ─ fd 14, 15 ► mapped privately, read (crate::saved)
//!  console         a pipe of ours     ─ fd 1 ──► the guest's serial port
//!  vmm.log         memory of ours     ─ fd 2, 13 ► its own words
//! ```
//!
//! It makes its sockets itself, so it gets a folder for them; who listens is looked at before anything is said. It opens
//! a TAP by name, so it runs in the TAP's network namespace and owns it.
//!
//! What it saves names files by the paths that it was told. So it is told relative ones: it runs in its own folder, and a VM
//! that goes on from a saved one finds its own disks and makes its own socket there.
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
    AGENT_SOCKET, Action, ActionType, Balloon, BootSource, DISKS, Drive, DrivePath, MachineConfig,
    MemoryBackend, NetworkInterface, NetworkOverride, Nothing, OFF_BY_RESET, Pmem, Request, STATE_FILE,
    SnapshotCreate, SnapshotLoad, VmState, Vsock, links, requests, restore,
};
