//! What a VM is put together from.
//!
//! A capability is one concern of a VM's life (its root, its overlay disk, its VMM, its agent …) in one module. The
//! engine knows nothing about any of them: it runs their hooks, in order to start and backwards to stop or undo.
//!
//! ```text
//! start:  plan plan plan … │ prepare prepare prepare … (the VMM's launches) │ after_boot after_boot …
//! stop:   stop … stop stop                        (only those whose prepare was begun, backwards)
//! reset:  reset reset reset …
//! rm:     clean_up … clean_up clean_up            (backwards)
//! daemon restart with a running VM:  adopt adopt adopt …
//! every minute:  tend tend tend … of each VM that runs, then leftovers, remove_leftover     (backwards)
//! ```

use async_trait::async_trait;
use offshoot_agent_proto::v1;
use offshoot_model::{Explain, Finding, KernelObject, VmId};
use offshoot_vmm::LaunchPlan;

use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// A capability's own error, boxed: the engine adds only which stage it was.
pub type CapabilityError = Box<dyn Explain + Send + Sync>;

/// Whether there is a VM of this id.
pub type Known<'a> = &'a (dyn Fn(&VmId) -> bool + Send + Sync);

/// Everything that is decided before a start does anything: what the VMM is told, and what the guest is told.
#[derive(Clone, Debug)]
pub struct VmPlan {
    /// What the VMM is started with.
    pub launch: LaunchPlan,
    /// What makes the booted guest this VM. The agent's capability adds the time and the entropy.
    pub guest: v1::ConfigureRequest,
    /// What the VM gets in the host's kernel. It is written to the database before the first `prepare`.
    pub objects: Vec<KernelObject>,
}

/// One concern of a VM's life. A hook that a concern has no use for is left out.
///
/// Every hook may be called again after a crash and must then end in the same result. Every future may be dropped at
/// any await point: `stop` (and, for what outlives a run, `clean_up`) must cope with whatever was done until then.
#[async_trait]
pub trait Capability: Send + Sync {
    /// Its name in stages, findings and messages.
    fn name(&self) -> &'static str;

    /// What this host offers for it. Asked by `doctor` and before every start, so that the two never disagree.
    async fn check(&self) -> Vec<Finding> {
        Vec::new()
    }

    /// Adds what it needs to the plan. Changes nothing and reads no more than a small manifest; same input, same plan.
    /// Called once per start, before any `prepare`.
    fn plan(&self, _vm: &VmRecord, _paths: &VmPaths, _plan: &mut VmPlan) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// Makes what the plan names. Called once per start, after every `plan`; on failure this capability's `stop` is
    /// called too.
    async fn prepare(&self, _run: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// What can only be done in the booted guest. Called once per start, after every `prepare`.
    async fn after_boot(&self, _run: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// Finds again what a run had before the daemon was restarted. Called once instead of `prepare` and `after_boot`.
    async fn adopt(&self, _run: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// Mends what somebody else broke of a VM that runs, and tells what it mended, a line each. Called every minute, never
    /// while another hook of the run is under way.
    async fn tend(&self, _run: &Run) -> Result<Vec<String>, CapabilityError> {
        Ok(Vec::new())
    }

    /// Undoes `prepare` and `after_boot` as far as they came. Called at the end of every run and of every start that
    /// failed; must not fail for what is gone already. [`Run::ending`] says how much of a hurry there is.
    async fn stop(&self, _run: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// Drops what the VM wrote, but for its work; the next start finds the image again. Called when nothing of the VM
    /// runs.
    async fn reset(&self, _vm: &VmRecord, _paths: &VmPaths) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// Removes what outlives a run. Called once, at `rm`, when nothing of the VM runs.
    async fn clean_up(&self, _vm: &VmRecord, _paths: &VmPaths) -> Result<(), CapabilityError> {
        Ok(())
    }

    /// What lies about of this concern and belongs to no VM that `known` knows. Changes nothing. Asked at the start of the
    /// daemon, every minute and by `doctor`; must not look at what other daemons made.
    async fn leftovers(&self, _known: Known<'_>) -> Vec<KernelObject> {
        Vec::new()
    }

    /// Removes one of the `leftovers`; it is no error if it is gone.
    async fn remove_leftover(&self, _object: &KernelObject) -> Result<(), CapabilityError> {
        Ok(())
    }
}
