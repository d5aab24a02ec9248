//! A host that exists only in memory: a VMM that runs nothing, and capabilities that note what is asked of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use offshoot_engine::capability::{Capability, CapabilityError, Known, VmPlan};
use offshoot_engine::definition::{Choice, VmRecord};
use offshoot_engine::engine::{CreateRequest, Engine, EngineConfig, Parts};
use offshoot_engine::networks::{Networks, NetworksConfig};
use offshoot_engine::paths::VmPaths;
use offshoot_engine::run::Run;
use offshoot_model::{
    BaseId, ByteSize, Digest, ErrorKind, Explain, Finding, ImageConfig, KernelId, KernelObject, ObjectKind,
    Severity, VmConfig, VmId,
};
use offshoot_net::Namespace;
use offshoot_net::host_ports::FreePorts;
use offshoot_store::db::Db;
use offshoot_sys::process::ProcessIdentity;
use offshoot_vmm::{
    AgentEndpoint, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots, VmmExit,
};
use tokio::sync::watch;

/// What the dolls did and are told to do.
#[derive(Default)]
pub(crate) struct Host {
    notes: Mutex<Vec<String>>,
    /// `<capability>.<hook>` that fails.
    pub(crate) fails: Mutex<Option<&'static str>>,
    /// `<capability>.<hook>` that never comes to an end.
    pub(crate) hangs: Mutex<Option<&'static str>>,
    /// VMs whose VMM runs, in whatever daemon's time.
    pub(crate) running: Mutex<BTreeSet<VmId>>,
    /// Things of VMs that are gone.
    pub(crate) litter: Mutex<Vec<KernelObject>>,
    /// What the check of `root` finds.
    pub(crate) broken: Mutex<Option<&'static str>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.notes))
    }

    async fn reach(&self, capability: &str, hook: &str) -> Result<(), CapabilityError> {
        let name = format!("{capability}.{hook}");
        lock(&self.notes).push(name.clone());
        if *lock(&self.hangs) == Some(&name) {
            std::future::pending::<()>().await;
        }
        if *lock(&self.fails) == Some(&name) {
            return Err(Box::new(Broken));
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it broke")]
struct Broken;

impl Explain for Broken {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        vec!["mend it".into()]
    }
}

/// A capability that notes its hooks; the one named `vmm` also makes the machine.
struct Noted {
    name: &'static str,
    host: Arc<Host>,
}

impl Noted {
    fn is_vmm(&self) -> bool {
        self.name == "vmm"
    }
}

#[async_trait]
impl Capability for Noted {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn check(&self) -> Vec<Finding> {
        let broken = *lock(&self.host.broken);
        let broken = broken.filter(|_| self.name == "root");
        let finding = |message| Finding::new("root", Severity::Failure, message, "mend the root");
        broken.map(finding).into_iter().collect()
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        plan.objects.push(KernelObject {
            kind: ObjectKind::Folder,
            name: format!("/doll/{}/{}", vm.id, self.name),
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "prepare").await?;
        if self.is_vmm() {
            lock(&self.host.running).insert(run.vm.id.clone());
            run.set_machine(Arc::new(Doll::new(&run.vm.id, Arc::clone(&self.host))));
        }
        Ok(())
    }

    async fn after_boot(&self, _: &Run) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "after_boot").await
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "adopt").await?;
        if self.is_vmm() && lock(&self.host.running).contains(&run.vm.id) {
            run.set_machine(Arc::new(Doll::new(&run.vm.id, Arc::clone(&self.host))));
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "stop").await?;
        if let Some(machine) = run.machine().filter(|_| self.is_vmm()) {
            machine
                .kill()
                .await
                .map_err(|error| Box::new(error) as CapabilityError)?;
        }
        Ok(())
    }

    async fn reset(&self, _: &VmRecord, _: &VmPaths) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "reset").await
    }

    async fn clean_up(&self, _: &VmRecord, _: &VmPaths) -> Result<(), CapabilityError> {
        self.host.reach(self.name, "clean_up").await
    }

    async fn leftovers(&self, _: Known<'_>) -> Vec<KernelObject> {
        if self.is_vmm() {
            lock(&self.host.litter).clone()
        } else {
            Vec::new()
        }
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        lock(&self.host.litter).retain(|other| other != object);
        Ok(())
    }
}

/// A machine that is nothing but its state.
pub(crate) struct Doll {
    state: MachineState,
    host: Arc<Host>,
    exit: watch::Sender<Option<VmmExit>>,
    waits_for_room: watch::Sender<bool>,
}

impl Doll {
    fn new(id: &VmId, host: Arc<Host>) -> Self {
        let state = MachineState {
            driver: "doll".into(),
            vm: id.clone(),
            process: ProcessIdentity {
                pid: 1,
                start_ticks: 0,
                boot_id: String::new(),
            },
            run_dir: "/doll".into(),
            control: "/doll/control".into(),
            agent: AgentEndpoint::UnixLink("/doll/agent".into()),
            console: "/doll/console".into(),
            log: "/doll/log".into(),
            disks: Default::default(),
        };
        Self {
            state,
            host,
            exit: watch::Sender::new(None),
            waits_for_room: watch::Sender::new(false),
        }
    }
}

#[async_trait]
impl Machine for Doll {
    fn state(&self) -> &MachineState {
        &self.state
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        Ok(MachineStatus::Running)
    }

    async fn pause(&self) -> Result<(), MachineError> {
        lock(&self.host.notes).push("pause".into());
        Ok(())
    }

    async fn resume(&self) -> Result<(), MachineError> {
        lock(&self.host.notes).push("resume".into());
        Ok(())
    }

    async fn power_button(&self) -> Result<(), MachineError> {
        Ok(())
    }

    async fn quit(&self) -> Result<(), MachineError> {
        self.kill().await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        lock(&self.host.running).remove(&self.state.vm);
        self.exit.send_replace(Some(VmmExit {
            cause: ExitCause::Killed,
            process: None,
        }));
        Ok(())
    }

    async fn wait_exit(&self) -> VmmExit {
        let mut exit = self.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await.expect("the sender is here");
        exit.expect("waited for")
    }

    fn waits_for_room(&self) -> watch::Receiver<bool> {
        self.waits_for_room.subscribe()
    }

    async fn resize_disk(&self, serial: &str, _: ByteSize) -> Result<(), MachineError> {
        Err(MachineError::NoDisk {
            serial: serial.into(),
        })
    }

    async fn console_tail(&self, _: usize) -> Result<Vec<u8>, MachineError> {
        Ok(Vec::new())
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
}

/// An engine on `host` with its files in `folder`, as a daemon that starts makes it.
pub(crate) async fn engine(folder: &Path, host: &Arc<Host>) -> Engine {
    let capabilities = ["root", "vmm", "main"].map(|name| {
        Arc::new(Noted {
            name,
            host: Arc::clone(host),
        }) as Arc<dyn Capability>
    });
    let owner = std::os::unix::fs::MetadataExt::gid(&std::fs::metadata(folder).unwrap());
    let db = Db::open(folder).unwrap();
    let networks = Networks::open(
        db.clone(),
        Namespace::own(),
        Arc::new(FreePorts {
            namespace: Namespace::own(),
        }),
        NetworksConfig {
            pool: "10.87.0.0/16".parse().unwrap(),
            data_dir: folder.join("data"),
            tap_pool_size: 0,
        },
    );
    Engine::start(Parts {
        db,
        networks: networks.await.unwrap(),
        config: EngineConfig {
            data_dir: folder.join("data"),
            run_dir: folder.join("run"),
            uid_base: 1000,
            uid_count: 100,
            gid: owner,
        },
        capabilities: capabilities.to_vec(),
        templates: None,
    })
    .await
    .unwrap()
}

/// A request for a VM of this name.
pub(crate) fn vm(name: &str, change: impl FnOnce(&mut VmConfig)) -> CreateRequest {
    let mut config = VmConfig::new("image");
    config.name = Some(name.parse().unwrap());
    config.cmd = vec!["sh".into()];
    change(&mut config);
    CreateRequest {
        config,
        image_config: ImageConfig::default(),
        image_digest: Digest::from_bytes([1; 32]),
        base_id: BaseId::from_bytes(&[1; 16]),
        kernel_id: KernelId::from_bytes(&[1; 8]),
        vmm: Choice::default(),
        root: Choice::default(),
    }
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !so() {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "waited in vain for {what}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
