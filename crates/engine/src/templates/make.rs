//! Making a template: a VM of its own is started by the same capabilities as every VM, and saved before it is anybody.
//!
//! ```text
//! turn ─► recorded ─► prepare prepare … ─► first word ─► rehearse ─► pause ─► save ─► end ─► publish
//!                     └──────── whatever happens: stop … stop stop, folders and record removed ───────┘
//! ```
//!
//! It has an id like a VM, so what a crash leaves of it is found as what is left of a VM that is gone.

use std::sync::Arc;
use std::time::Duration;

use offshoot_agent_proto::client::{AgentClient, CallError, ConnectError};
use offshoot_agent_proto::v1;
use offshoot_model::{ByteSize, ErrorKind, Explain, Mac, VmId};
use offshoot_store::db::DbError;
use offshoot_sys::memory_file;
use offshoot_vmm::plan::{NetBackend, NetPlan, Origin, TapSlot};
use offshoot_vmm::{AgentEndpoint, ExitCause, Machine, MachineError};

use super::manifest::TemplateKey;
use super::store::{STATE_MAX, TemplateError, state_path};
use super::{Templates, blocking};
use crate::capabilities::tap_name;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::{Life, VmDefinition, VmRecord};
use crate::engine::Core;
use crate::error::StageFailure;
use crate::operation::{Stages, Subject};
use crate::output::OutputLog;
use crate::owner::{chain, now_ms, remove_tree};
use crate::run::{Ending, Run, empty_plan};

/// Which concerns of a VM's life one has that is nobody's.
const CONCERNS: [&str; 8] = [
    "admission",
    "folders",
    "limits",
    "root",
    "overlay",
    "work",
    "kernel",
    "vmm",
];

/// How long its guest may take to boot at least: VMs that start go first, so there is no hurry.
pub(crate) const BOOT: Duration = Duration::from_secs(120);

/// The address of its network device. A VM that is restored gets its own before it speaks to anybody.
pub(crate) const MAC: Mac = Mac([0x02, 0, 0, 0, 0, 1]);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// A stage of the VM's start.
    #[error("cannot start the VM that becomes the template ({stage})")]
    Start {
        /// Which.
        stage: String,
        /// Why.
        #[source]
        source: StageFailure,
    },
    /// It is not what the VM that wants the template is.
    #[error("the VM that becomes the template would be another one")]
    Shape,
    /// Its agent.
    #[error("the guest that becomes the template does not answer")]
    Connect {
        /// Why.
        #[source]
        source: ConnectError,
    },
    /// Its agent took too long.
    #[error("the guest that becomes the template did not come up within {limit:?}")]
    Late {
        /// How long it had.
        limit: Duration,
    },
    /// Its guest or VMM ended.
    #[error("the guest that becomes the template ended while it booted ({exit})")]
    Ended {
        /// How.
        exit: ExitCause,
    },
    /// Its agent could not prepare it.
    #[error("the guest cannot become a template")]
    Rehearse {
        /// Why.
        #[source]
        source: CallError,
    },
    /// It could not be saved.
    #[error("the VM cannot be saved")]
    Save {
        /// Why.
        #[source]
        source: MachineError,
    },
    /// Its VMM saves nothing.
    #[error("{vmm} cannot save VMs")]
    Unsupported {
        /// Which.
        vmm: String,
    },
    /// Its files.
    #[error(transparent)]
    Store(#[from] TemplateError),
    /// Its memory or its TAP.
    #[error("cannot make {what} of the VM that becomes the template")]
    Io {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its record.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The daemon ends.
    #[error("the daemon ends")]
    Ending,
}

impl Explain for MakeError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Start { source, .. } => source.0.kind(),
            Self::Store(source) => source.kind(),
            Self::Db(source) => source.kind(),
            Self::Unsupported { .. } => ErrorKind::NotPossible,
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Start { source, .. } => source.0.hints(),
            Self::Store(source) => source.hints(),
            Self::Db(source) => source.hints(),
            _ => vec!["boot the VM's kernel with `--boot cold`".into()],
        }
    }
}

/// The VM that becomes a template, known as long as this is there.
struct Maker<'a> {
    templates: &'a Templates,
    id: VmId,
}

impl Drop for Maker<'_> {
    fn drop(&mut self) {
        self.templates.state().makers.remove(&self.id);
    }
}

impl Templates {
    /// Makes the template of a VM's kind in the background, when no VM is being started; nothing when it is there already.
    pub(crate) fn make_later(self: &Arc<Self>, core: &Arc<Core>, vm: &Arc<VmRecord>, key: TemplateKey) {
        if !self.rules.background {
            return;
        }
        let (templates, core, vm) = (Arc::clone(self), Arc::clone(core), Arc::clone(vm));
        tokio::spawn(async move {
            let mut starts = templates.starts.subscribe();
            // The sender lives in `templates`.
            let _ = starts.wait_for(|starts| *starts == 0).await;
            match templates.make(&core, &vm, &key).await {
                Ok(()) | Err(MakeError::Ending) => {}
                Err(error) => {
                    *templates.state().failures.entry(key.id()).or_default() += 1;
                    tracing::warn!(template = %key.id(), causes = ?chain(&error), "cannot make a template");
                }
            }
        });
    }

    /// Makes the template of a VM's kind unless it is there already; one for each kind at a time, however many ask.
    pub(crate) async fn make(&self, core: &Core, vm: &VmRecord, key: &TemplateKey) -> Result<(), MakeError> {
        let id = key.id();
        let turn = self.turn_of(&id);
        let _turn = turn.lock().await;
        let _user = self.turn.lock().await;
        if self.ending.is_cancelled() {
            return Err(MakeError::Ending);
        }
        let (store, wanted) = (self.store.clone(), id.clone());
        // Held until it is published: other processes wait.
        let _lock = blocking(move || store.lock(&wanted)).await?;
        if self.store.get(&id).is_ok() {
            return Ok(());
        }
        let maker = Maker {
            id: VmId::from_bytes(&offshoot_sys::random::bytes::<8>().map_err(io("a name"))?),
            templates: self,
        };
        self.state().makers.insert(maker.id.clone());
        let subject = Subject::named(vm.definition.config.image.clone());
        let mut stages = core.operations.begin("template", subject);
        let made = self.make_as(core, vm, key, &maker.id, &mut stages).await;
        drop(stages);
        match &made {
            Ok(()) => tracing::info!(template = %id, image = vm.definition.config.image, "made a template"),
            Err(error) => tracing::debug!(template = %id, %error, "made no template"),
        }
        made
    }

    async fn make_as(
        &self,
        core: &Core,
        vm: &VmRecord,
        key: &TemplateKey,
        id: &VmId,
        stages: &mut Stages,
    ) -> Result<(), MakeError> {
        let record = self.nobody(vm, id);
        let paths = core.parts.paths(id);
        let capabilities: Vec<_> = core
            .parts
            .capabilities
            .iter()
            .filter(|capability| CONCERNS.contains(&capability.name()))
            .cloned()
            .collect();
        let mut plan = empty_plan(id.clone());
        for capability in &capabilities {
            capability
                .plan(&record, &paths, &mut plan)
                .map_err(|source| start(capability.name(), "plan", source))?;
        }
        let size = plan.launch.memory.bytes();
        let memory = memory_file::create(&format!("offshoot-{id}"), size).map_err(io("the memory"))?;
        let memory = Arc::new(memory);
        plan.launch.origin = Origin::KernelInto(Arc::clone(&memory));
        if key.network {
            let slot = TapSlot::default();
            plan.launch.nets.push(NetPlan {
                backend: NetBackend::TapFd(slot),
                mac: MAC,
            });
        }
        // What it is made for must be able to go on from it.
        if self.key(&record, &plan.launch).await.ok().as_ref() != Some(key) {
            return Err(MakeError::Shape);
        }
        let (owner, objects) = (id.clone(), plan.objects.clone());
        core.parts
            .db
            .call(move |db| db.put_objects(&owner, &objects))
            .await?;
        let output = OutputLog::open(&paths.output()).map_err(io("the output log"))?;
        let run = Run::new(Arc::new(record), paths, plan, output);
        let stage = self.store.stage()?;
        let state = state_path(&stage);
        let mut begun = 0;
        let limit = BOOT.max(self.rules.boot_timeout);
        let saved = tokio::select! {
            saved = boot_and_save(core, &capabilities, &run, limit, &mut begun, stages, &state) => saved,
            () = self.ending.cancelled() => Err(MakeError::Ending),
        };
        run.set_ending(Ending::Kill);
        for capability in capabilities[..begun].iter().rev() {
            let name = format!("{}.stop", capability.name());
            if let Err(error) = stages.stage(&name, capability.stop(&run)).await {
                let causes = chain(&StageFailure(error));
                tracing::warn!(stage = name, ?causes, "while a template is made");
            }
        }
        run.over.cancel();
        let paths = run.paths.clone();
        let swept = blocking(move || remove_tree(paths.run()).and_then(|()| remove_tree(paths.data()))).await;
        if let Err(error) = swept {
            tracing::warn!(%error, "cannot delete the files of a VM that became a template");
        }
        let owner = id.clone();
        core.parts.db.call(move |db| db.put_objects(&owner, &[])).await?;
        let disks = saved?;
        let (store, key) = (self.store.clone(), key.clone());
        let publish = blocking(move || store.publish(stage, &key, &memory, disks, now_ms()));
        stages.stage("publish", publish).await?;
        Ok(())
    }

    /// The same VM as nobody.
    fn nobody(&self, vm: &VmRecord, id: &VmId) -> VmRecord {
        let mut config = vm.definition.config.clone();
        config.mounts.clear();
        VmRecord {
            id: id.clone(),
            uid: self.rules.uid,
            definition: VmDefinition {
                config,
                attachment: None,
                ..vm.definition.clone()
            },
            life: Life::new(),
            ..vm.clone()
        }
    }
}

/// Starts it, lets its agent prepare it, and saves it; gives its disks. `begun` says how many capabilities are to be
/// stopped, also when the future is dropped.
async fn boot_and_save(
    core: &Core,
    capabilities: &[Arc<dyn Capability>],
    run: &Run,
    limit: Duration,
    begun: &mut usize,
    stages: &mut Stages,
    state: &std::path::Path,
) -> Result<Vec<(String, ByteSize)>, MakeError> {
    for capability in capabilities {
        if capability.name() == "vmm" {
            open_taps(core, run)?;
        }
        *begun += 1;
        let name = format!("{}.prepare", capability.name());
        let prepared = stages.stage(&name, capability.prepare(run)).await;
        prepared.map_err(|source| start(capability.name(), "prepare", source))?;
    }
    let machine = run.machine().ok_or(MakeError::Shape)?;
    let agent = stages.stage("boot", first_word(&*machine, limit)).await?;
    run.booted.cancel();
    let request = rehearsal(&run.plan);
    stages
        .stage("rehearse", agent.rehearse(request))
        .await
        .map_err(|source| MakeError::Rehearse { source })?;
    drop(agent);
    stages
        .stage("save", async {
            machine.pause().await?;
            let Some(snapshots) = machine.snapshots() else {
                return Ok(false);
            };
            snapshots.save(state, STATE_MAX).await?;
            Ok(true)
        })
        .await
        .map_err(|source| MakeError::Save { source })?
        .then_some(())
        .ok_or_else(|| MakeError::Unsupported {
            vmm: run.vm.definition.vmm.chosen.clone(),
        })?;
    let writable = run.plan.launch.disks.iter().filter(|disk| !disk.read_only);
    writable
        .map(|disk| {
            let length = std::fs::metadata(&disk.path).map_err(io("a disk"))?.len();
            Ok((disk.serial.clone(), ByteSize::from_bytes(length)))
        })
        .collect()
}

/// TAPs that lead nowhere, for the devices that the guest finds. They end with the VMM.
pub(crate) fn open_taps(core: &Core, run: &Run) -> Result<(), MakeError> {
    for net in &run.plan.launch.nets {
        if let NetBackend::TapFd(slot) = &net.backend {
            let made = core.parts.networks.links().create_tap(&tap_name(&run.vm.id));
            let tap = made.map_err(|error| MakeError::Start {
                stage: "network.prepare".into(),
                source: StageFailure(Box::new(error)),
            })?;
            slot.fill(tap.file);
        }
    }
    Ok(())
}

/// What its agent is to do before it is saved: all that every VM of this kind does, and nothing that makes it one.
fn rehearsal(plan: &VmPlan) -> v1::RehearseRequest {
    v1::RehearseRequest {
        root: plan.guest.root.clone().and_then(|root| match root {
            v1::configure_request::Root::RootBlockSerial(serial) => {
                Some(v1::rehearse_request::Root::RootBlockSerial(serial))
            }
            v1::configure_request::Root::RootPmemIndex(index) => {
                Some(v1::rehearse_request::Root::RootPmemIndex(index))
            }
            _ => None,
        }),
        network: !plan.launch.nets.is_empty(),
    }
}

/// Connects to its agent, within `limit`.
pub(crate) async fn first_word(machine: &dyn Machine, limit: Duration) -> Result<AgentClient, MakeError> {
    let connect = async {
        match machine.agent_endpoint() {
            AgentEndpoint::UnixLink(path) => AgentClient::connect_unix_link(path).await,
            AgentEndpoint::HybridVsock { path, port } => {
                let maker = Some(machine.state().process.pid);
                AgentClient::connect_hybrid_vsock(path, *port, maker).await
            }
        }
    };
    tokio::select! {
        connected = connect => connected.map_err(|source| MakeError::Connect { source }),
        exit = machine.wait_exit() => Err(MakeError::Ended { exit: exit.cause }),
        () = tokio::time::sleep(limit) => Err(MakeError::Late { limit }),
    }
}

fn start(capability: &str, hook: &str, source: CapabilityError) -> MakeError {
    MakeError::Start {
        stage: format!("{capability}.{hook}"),
        source: StageFailure(source),
    }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> MakeError {
    move |source| MakeError::Io { what, source }
}
