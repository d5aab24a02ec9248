//! The VMM: the process that is the machine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, Finding, Severity};
use offshoot_sys::kvm::KvmProbe;
use offshoot_vmm::plan::{Accel, AgentChannel, VmmIdentity};
use offshoot_vmm::{Driver, MachineState};

use super::finding;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::{Ending, Run};

/// How guest instructions are run on this host, found out once.
#[derive(Clone, Debug)]
pub struct Accelerator {
    /// What VMMs are told.
    pub accel: Accel,
    /// What the probe saw.
    pub probe: KvmProbe,
    /// The group of `/dev/kvm`, which VMMs need to open it.
    pub kvm_gid: Option<u32>,
}

/// Launches, finds again and ends the VMM.
pub struct VmmCapability {
    /// The drivers of this build, by name.
    pub drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
    /// How guest instructions are run.
    pub accelerator: Accelerator,
    /// The group that may read bases and kernels.
    pub gid: u32,
}

/// No driver of that name.
#[derive(Debug, thiserror::Error)]
#[error("this offshootd has no driver for the VMM `{kind}`")]
struct NoDriver {
    kind: String,
}

impl Explain for NoDriver {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        vec!["see `offshoot system info` for those it has".into()]
    }
}

/// How long an orderly end of the VMM may take before its process is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

impl VmmCapability {
    fn driver(&self, kind: &str) -> Result<&Arc<dyn Driver>, CapabilityError> {
        self.drivers.get(kind).ok_or_else(|| {
            Box::new(NoDriver {
                kind: kind.to_owned(),
            }) as CapabilityError
        })
    }
}

#[async_trait]
impl Capability for VmmCapability {
    fn name(&self) -> &'static str {
        "vmm"
    }

    async fn check(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut any = false;
        for driver in self.drivers.values() {
            match driver.probe().await {
                Ok(facts) => {
                    any = true;
                    let said = format!("{} {} at {}", facts.kind, facts.version, facts.program.display());
                    findings.push(finding(self.name(), Severity::Ok, said, ""));
                }
                Err(error) => {
                    let hint = error.hints().into_iter().next().unwrap_or_default();
                    findings.push(finding(self.name(), Severity::Warning, error.to_string(), hint));
                }
            }
        }
        if !any {
            let hint = "apt install qemu-system-x86";
            findings.push(finding(
                self.name(),
                Severity::Failure,
                "no VMM is installed",
                hint,
            ));
        }
        findings.push(match self.accelerator.accel {
            Accel::Kvm => finding(
                self.name(),
                Severity::Ok,
                self.accelerator.probe.explanation.clone(),
                "",
            ),
            Accel::Tcg => finding(
                self.name(),
                Severity::Warning,
                format!(
                    "{}; guests are emulated in software and slow",
                    self.accelerator.probe.explanation
                ),
                "use a host whose processor offers virtualisation to Linux (`ls -l /dev/kvm`)",
            ),
        });
        findings
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let launch = &mut plan.launch;
        let config = &vm.definition.config;
        launch.cpus = config.cpus;
        launch.memory = ByteSize::from_mib(config.memory.mib());
        launch.accel = self.accelerator.accel;
        launch.agent = AgentChannel::VirtioSerial;
        let kvm = self
            .accelerator
            .kvm_gid
            .filter(|_| self.accelerator.accel == Accel::Kvm);
        let groups = std::iter::once(self.gid).chain(kvm).collect();
        launch.identity = Some(VmmIdentity {
            uid: vm.uid,
            gid: vm.uid,
            groups,
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let driver = self.driver(&run.vm.definition.vmm.chosen)?;
        let machine = driver
            .launch(&run.plan.launch)
            .await
            .map_err(|error| Box::new(error) as CapabilityError)?;
        run.set_machine(machine.into());
        Ok(())
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        let driver = self.driver(&run.vm.definition.vmm.chosen)?;
        // A daemon that died inside `launch` wrote no row; the file beside the sockets says what it started.
        let state = match &run.vm.life.machine {
            Some(state) => Some(state.clone()),
            None => MachineState::load(run.paths.run()).unwrap_or_else(|error| {
                tracing::warn!(vm = %run.vm.name, %error, "cannot read what an earlier daemon launched");
                None
            }),
        };
        let Some(state) = state else { return Ok(()) };
        if let Some(machine) = driver
            .reopen(&state)
            .await
            .map_err(|error| Box::new(error) as CapabilityError)?
        {
            run.set_machine(machine.into());
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(machine) = run.machine() else {
            return Ok(());
        };
        if run.ending() != Ending::Kill && run.ending() != Ending::Discard {
            let _ = tokio::time::timeout(QUIT_TIMEOUT, machine.quit()).await;
        }
        machine
            .kill()
            .await
            .map_err(|error| Box::new(error) as CapabilityError)
    }
}
