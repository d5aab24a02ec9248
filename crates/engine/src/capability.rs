//! What a VM is put together from.
//!
//! A capability is one concern of a VM's life (its root, its overlay disk, its VMM, its agent …) in one module. The
//! engine knows nothing about any of them: it runs their hooks, in order to start and backwards to stop or undo.
//!
//! ```text
//! start:  plan plan plan … │ prepare prepare prepare … (the VMM's launches) │ after_boot after_boot …
//! stop:   stop … stop stop                        (only those whose prepare was begun, backwards)
//! rm:     clean_up … clean_up clean_up            (backwards)
//! daemon restart with a running VM:  adopt adopt adopt …
//! ```

use async_trait::async_trait;
use offshoot_model::{Explain, Finding};
use offshoot_vmm::LaunchPlan;

use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// A capability's own error, boxed: the engine adds only which stage it was.
pub type CapabilityError = Box<dyn Explain + Send + Sync>;

/// One concern of a VM's life.
///
/// Every hook may be called again after a crash and must then end in the same result. Every future may be dropped at
/// any await point: `stop` (and, for what outlives a run, `clean_up`) must cope with whatever was done until then.
#[async_trait]
pub trait Capability: Send + Sync {
    /// Its name in stages, findings and messages.
    fn name(&self) -> &'static str;

    /// What this host offers for it. Asked by `doctor` and before every start, so that the two never disagree.
    async fn check(&self) -> Vec<Finding>;

    /// Adds what it needs to the launch plan. Pure: no I/O, same input, same plan. Called once per start, before any
    /// `prepare`.
    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut LaunchPlan) -> Result<(), CapabilityError>;

    /// Makes what the plan names. Called once per start, after every `plan`; on failure this capability's `stop` is
    /// called too.
    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError>;

    /// What can only be done in the booted guest. Called once per start, after every `prepare`.
    async fn after_boot(&self, run: &Run) -> Result<(), CapabilityError>;

    /// Finds again what a run had before the daemon was restarted. Called once instead of `prepare` and `after_boot`.
    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError>;

    /// Undoes `prepare` and `after_boot` as far as they came. Called at the end of every run and of every start that
    /// failed; must not fail for what is gone already. [`Run::ending`] says how much of a hurry there is.
    async fn stop(&self, run: &Run) -> Result<(), CapabilityError>;

    /// Removes what outlives a run. Called once, at `rm`, when nothing of the VM runs.
    async fn clean_up(&self, vm: &VmRecord, paths: &VmPaths) -> Result<(), CapabilityError>;
}
