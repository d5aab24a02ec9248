//! The capabilities, in the order they start.
//!
//! `work.rs` is the smallest one and the example to copy for a new one.

mod agent;
mod disk;
mod folders;
mod kernel;
mod main_process;
mod mounts;
mod overlay;
mod root;
mod vmm;
mod work;

pub use agent::AgentCapability;
pub use folders::FoldersCapability;
pub use kernel::KernelCapability;
pub use main_process::MainProcessCapability;
pub use mounts::{MountError, MountsCapability, check_source};
pub use overlay::OverlayCapability;
pub use root::RootCapability;
pub use vmm::{Accelerator, VmmCapability};
pub use work::WorkCapability;

use offshoot_model::{Finding, Severity};

/// A finding of `capability`.
fn finding(
    capability: &str,
    severity: Severity,
    message: impl Into<String>,
    hint: impl Into<String>,
) -> Finding {
    Finding {
        capability: capability.to_owned(),
        severity,
        message: message.into(),
        hint: hint.into(),
    }
}
