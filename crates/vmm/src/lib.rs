//! Virtual machine monitors: what a VM needs ([`LaunchPlan`]) goes in, a running process ([`Machine`]) comes out.
//!
//! Nothing here knows networks, storage or images: a disk is a path, a network device the name of a TAP. One trait
//! pair, [`Driver`] and [`Machine`], stands before every VMM; [`qemu`] is the first behind it. The fake
//! (`crates/fake-vmm`) is another *program* under the real QEMU driver, so that tests exercise the driver.
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
mod driver;
mod machine;
pub mod plan;
pub mod qemu;
mod said;
pub mod virtiofsd;
mod words;

pub use driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts, VmmFeature};
pub use machine::{
    AgentEndpoint, ControlError, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots,
    VmmExit,
};
pub use plan::LaunchPlan;
