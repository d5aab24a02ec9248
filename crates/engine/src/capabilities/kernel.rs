//! The kernel bundle: what the guest boots, and what it is told on its command line.

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_kernel::KernelStore;
use offshoot_model::{Finding, Severity};
use offshoot_vmm::plan::ConsoleDevice;

use super::finding;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;

/// What every guest's kernel is told.
///
/// `quiet loglevel=4`: every byte on the console is an exit of the guest. `panic=-1`: a panic resets at once, and the
/// VMM, started with no reboot, ends. `tsc=reliable no_timer_check`: no calibration loops against a virtual timer.
/// `cryptomgr.notests`: self-tests of ciphers take a fifth of an emulated boot. `jent_mod_init`: the self-test of a source
/// of entropy that nothing here draws from takes 0.3 s of 2.4 s of emulated processor time; without it that source is
/// not there. `random.trust_cpu=on`: the pool does not wait; the agent adds the host's entropy before anything runs.
/// `noreplace-smp`, `rcu_expedited`: no patching and no waiting for grace periods that one vCPU has for itself.
const COMMAND_LINE: [&str; 11] = [
    "quiet",
    "loglevel=4",
    "panic=-1",
    "tsc=reliable",
    "no_timer_check",
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init",
    "random.trust_cpu=on",
    "noreplace-smp",
    "rcupdate.rcu_expedited=1",
    "8250.nr_uarts=1",
];

/// Chooses kernel and initramfs of the VM's bundle.
pub struct KernelCapability {
    /// All bundles.
    pub kernels: Arc<KernelStore>,
}

#[async_trait]
impl Capability for KernelCapability {
    fn name(&self) -> &'static str {
        "kernel"
    }

    async fn check(&self) -> Vec<Finding> {
        let found = match self.kernels.default() {
            Ok(bundle) => finding(
                self.name(),
                Severity::Ok,
                format!("kernel {} ({})", bundle.manifest.release, bundle.id),
                "",
            ),
            Err(error) => finding(
                self.name(),
                Severity::Failure,
                error.to_string(),
                "add one with `offshoot kernel add --distro`",
            ),
        };
        vec![found]
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let launch = &mut plan.launch;
        let bundle = self
            .kernels
            .get(&vm.kernel_id)
            .map_err(|error| Box::new(error) as CapabilityError)?;
        launch.kernel = bundle.vmlinux();
        launch.initramfs = Some(bundle.initramfs());
        launch.console_device = ConsoleDevice::Serial;
        launch
            .cmdline
            .push(format!("console={}", launch.console_device.kernel_name()));
        launch.cmdline.extend(COMMAND_LINE.map(str::to_owned));
        Ok(())
    }
}
