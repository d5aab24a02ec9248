//! Virtual machine monitors: what a VM needs ([`LaunchPlan`]) goes in, a running process ([`Machine`]) comes out.
//!
//! Nothing here knows networks, storage or images: a disk is a path, a network device the name of a TAP. One trait
//! pair, [`Driver`] and [`Machine`], stands before every VMM: [`qemu`], [`cloud_hypervisor`] and [`firecracker`]; which of
//! them a VM gets is decided by [`policy`]. The fakes (`crates/fake-vmm`) are other *programs* under the real drivers, so
//! that tests exercise the drivers.
//! [`virtiofsd`] serves the folders that a plan shares; it is started before the VMM, which connects to it.
//!
//! ```text
//! LaunchPlan ─ validate ─► Driver::launch ─► VMM process ─► Box<dyn Machine> ─ state() ─► MachineState (stored)
//!                                              ▲                                              │
//!                    after a daemon restart    └──────────── Driver::reopen ◄────────────────┘
//! ```

mod ask;
mod bounded_log;
pub mod cloud_hypervisor;
mod console;
mod driver;
pub mod firecracker;
mod grow;
mod http;
mod machine;
pub mod plan;
pub mod policy;
mod process;
pub mod qemu;
mod said;
mod saved;
mod tended;
pub mod virtiofsd;
mod words;

pub use driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts, VmmFeature};
pub use machine::{
    AgentEndpoint, ControlError, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots,
    VmmExit,
};
pub use plan::LaunchPlan;
