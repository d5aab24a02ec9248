//! The VMM: the process that is the machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, Finding, KernelObject, ObjectKind, VmId};
use offshoot_sys::kvm::KvmProbe;
use offshoot_vmm::plan::{Accel, Origin, SavedGuest, VmmIdentity};
use offshoot_vmm::{Driver, Machine, MachineState, policy};
use tokio::sync::Semaphore;

use super::folders::entries;
use super::leftover::end_process;
use super::vmm_checks::{self, KvmNode};
use crate::capability::{Capability, CapabilityError, Known, VmPlan};
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
    /// Where the run folders of VMs lie.
    pub run_dir: PathBuf,
    /// How many emulated guests may boot at once.
    pub boots: Arc<Semaphore>,
}

/// An emulated guest that has not said a word after so long does not keep others from booting any more.
const BOOT_TURN: Duration = Duration::from_secs(30);

/// No driver of that name.
#[derive(Debug, thiserror::Error)]
#[error("this offshootd has no driver for the VMM `{kind}`")]
struct NoDriver {
    kind: String,
}

/// A disk of the VM's own is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot look at the disk {}", path.display())]
struct NoDisk {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

impl Explain for NoDisk {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        vec!["run `offshoot doctor`".into()]
    }
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
    /// For so many emulated guests this host has the processors to boot them at once.
    pub fn boots_at_once() -> Arc<Semaphore> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Semaphore::new(2 * processors))
    }

    /// Waits until there is a processor for one more emulated boot; the turn ends with the guest's first word.
    ///
    /// A kernel that gets no processor for seconds while it measures its timer takes it for broken ("APIC frequency too
    /// slow") and falls back to the interval timer, which stops for good in one of twenty guests of a busy host.
    async fn wait_for_a_boot(&self, run: &Run) {
        if run.plan.launch.accel != Accel::Tcg {
            return;
        }
        // Nobody closes it.
        let Ok(turn) = Arc::clone(&self.boots).acquire_owned().await else {
            return;
        };
        let booted = run.booted.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(BOOT_TURN, booted.cancelled()).await;
            drop(turn);
        });
    }

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
        let mut asked = Vec::new();
        for driver in self.drivers.values() {
            asked.push(vmm_checks::ask(&**driver).await);
        }
        let mut findings = vmm_checks::judge_vmms(&asked, self.accelerator.accel);
        findings.push(vmm_checks::judge_kvm(&self.accelerator, KvmNode::look()));
        findings
    }

    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        plan.objects.push(process(&paths.run().join(MachineState::FILE)));
        let launch = &mut plan.launch;
        let config = &vm.definition.config;
        launch.cpus = config.cpus;
        launch.memory = ByteSize::from_mib(config.memory.mib());
        (launch.accel, launch.agent) = policy::ways(&vm.definition.vmm.chosen, self.accelerator.accel);
        // Root's own group is nobody's to have.
        let kvm = self
            .accelerator
            .kvm_gid
            .filter(|gid| launch.accel == Accel::Kvm && *gid != 0);
        let groups = std::iter::once(self.gid).chain(kvm).collect();
        launch.identity = Some(VmmIdentity {
            uid: vm.uid,
            gid: vm.uid,
            groups,
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        if let (Some(warm), Origin::Template(saved)) = (&run.warm, &run.plan.launch.origin) {
            tell_of_room(run, &*warm.machine);
            return go_on(&*warm.machine, saved, run).await;
        }
        let driver = self.driver(&run.vm.definition.vmm.chosen)?;
        let restored = matches!(run.plan.launch.origin, Origin::Template(_));
        if !restored {
            self.wait_for_a_boot(run).await;
        }
        let machine = driver
            .launch(&run.plan.launch)
            .await
            .map_err(|error| Box::new(error) as CapabilityError)?;
        tell_of_room(run, &*machine);
        run.set_machine(machine.into());
        if let (Some(machine), Origin::Template(saved)) = (run.machine(), &run.plan.launch.origin) {
            go_on(&*machine, saved, run).await?;
        }
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
            tell_of_room(run, &*machine);
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

    async fn leftovers(&self, known: Known<'_>) -> Vec<KernelObject> {
        let mut found = Vec::new();
        for (name, folder) in entries(&self.run_dir.join("vms")) {
            if name.parse::<VmId>().is_ok_and(|id| known(&id)) {
                continue;
            }
            if let Ok(Some(state)) = MachineState::load(&folder)
                && state.process.is_alive()
            {
                found.push(process(&folder.join(MachineState::FILE)));
            }
        }
        found
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        let folder = Path::new(&object.name).parent().unwrap_or(Path::new("/"));
        match MachineState::load(folder) {
            Ok(Some(state)) => end_process(&state.process).await,
            _ => Ok(()),
        }
    }
}

/// Lets a guest go on that was saved: it learns the sizes of its own disks first, before it looks at them.
async fn go_on(machine: &dyn Machine, saved: &SavedGuest, run: &Run) -> Result<(), CapabilityError> {
    let failed = |error| Box::new(error) as CapabilityError;
    for disk in run.plan.launch.disks.iter().filter(|disk| !disk.read_only) {
        let length = std::fs::metadata(&disk.path).map_err(|source| {
            Box::new(NoDisk {
                path: disk.path.clone(),
                source,
            }) as CapabilityError
        })?;
        let size = ByteSize::from_bytes(length.len());
        if !saved.disks.contains(&(disk.serial.clone(), size)) {
            machine.resize_disk(&disk.serial, size).await.map_err(failed)?;
        }
    }
    machine.resume().await.map_err(failed)
}

/// What a VM is told as while its VMM has halted it.
const NO_ROOM: &str =
    "it waits for room on the host's disk, and goes on when there is some: see `offshoot df`";

/// Says so as long as the guest stands still because the host has no room for what it writes.
fn tell_of_room(run: &Run, machine: &dyn Machine) {
    let (mut waits, health, over) = (machine.waits_for_room(), run.health(), run.over.clone());
    let tell = async move {
        loop {
            if *waits.borrow_and_update() {
                health.degrade(NO_ROOM.to_owned());
            } else {
                health.mend(NO_ROOM);
            }
            if waits.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::spawn(over.run_until_cancelled_owned(tell));
}

fn process(file: &Path) -> KernelObject {
    KernelObject {
        kind: ObjectKind::Process,
        name: file.display().to_string(),
    }
}
