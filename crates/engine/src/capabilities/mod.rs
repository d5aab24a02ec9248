//! The capabilities, in the order they start.
//!
//! `work.rs` is the smallest one and the example to copy for a new one.

mod admission;
mod agent;
mod disk;
mod firewall;
mod folders;
mod host_disk;
mod in_use;
mod kernel;
mod leftover;
mod limits;
mod main_process;
mod mounts;
mod names;
mod network;
mod overlay;
mod root;
mod ssh;
mod vmm;
mod vmm_checks;
mod work;

pub use admission::{AdmissionCapability, AdmissionError};
pub use agent::AgentCapability;
pub use firewall::FirewallCapability;
pub use folders::FoldersCapability;
pub use kernel::KernelCapability;
pub use limits::{GroupRecord, LimitsCapability};
pub use main_process::MainProcessCapability;
pub use mounts::{MountError, MountsCapability, check_source};
pub use names::NamesCapability;
pub use network::{NetworkCapability, tap_name};
pub use overlay::OverlayCapability;
pub use root::RootCapability;
pub use ssh::{SshCapability, port as ssh_port};
pub use vmm::{Accelerator, VmmCapability};
pub use vmm_checks::{Device, closed};
pub use work::WorkCapability;

use offshoot_model::{Finding, Severity};

/// A finding of `capability`; `.id(…)`, `.cost(…)` and `.fix(…)` say the rest.
pub(crate) fn finding(
    capability: &str,
    severity: Severity,
    message: impl Into<String>,
    hint: impl Into<String>,
) -> Finding {
    Finding::new(capability, severity, message, hint)
}

/// Runs a check that reads files where it holds nobody up.
async fn blocking<T: Send + 'static>(check: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(check).await {
        Ok(found) => found,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    [vec![error.to_string()], causes].concat().join(": ")
}
