//! Making a slot, and ending one that nobody took.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use offshoot_agent_proto::client::{AgentClient, CallError, ProcessEvent};
use offshoot_agent_proto::v1;
use offshoot_model::{ErrorKind, Explain, NetworkChoice, VmId, VmName};
use offshoot_store::db::DbError;
use offshoot_vmm::MachineError;
use offshoot_vmm::plan::{NetBackend, NetPlan, Origin, SavedGuest, TapSlot};

use super::{Known, Slot, Slots, Warm};
use crate::capability::{Capability, CapabilityError};
use crate::definition::{Life, VmDefinition, VmRecord};
use crate::engine::{Core, CreateRequest};
use crate::error::StageFailure;
use crate::operation::{Stages, Subject};
use crate::output::OutputLog;
use crate::owner::{chain, now_ms, remove_tree};
use crate::run::{Ending, Run, empty_plan};
use crate::templates::store::LoadedTemplate;
use crate::templates::{BOOT, MAC, MakeError, Offer, first_word, open_taps};

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

/// What is run in it: what a first command needs of the agent, the kernel and the image is then there, and, where guests are
/// emulated, translated.
const FIRST: &str = "true";

/// Why there is no slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Nothing to restore it from.
    #[error("a warm slot has nothing to be restored from: {reason}")]
    NoTemplate {
        /// Why.
        reason: String,
    },
    /// Its template could not be made, or its guest did not answer.
    #[error("cannot make a warm slot")]
    Make {
        /// Why.
        #[source]
        source: Box<MakeError>,
    },
    /// A stage.
    #[error("cannot make a warm slot ({stage})")]
    Stage {
        /// Which.
        stage: String,
        /// Why.
        #[source]
        source: StageFailure,
    },
    /// Its agent.
    #[error("the guest of a warm slot cannot be warmed")]
    Agent {
        /// Why.
        #[source]
        source: CallError,
    },
    /// Its VMM.
    #[error("a warm slot cannot be paused")]
    Pause {
        /// Why.
        #[source]
        source: MachineError,
    },
    /// No user for its VMM.
    #[error("no user id is free for a warm slot")]
    NoUid,
    /// Random bytes or its output log.
    #[error("cannot make {what} of a warm slot")]
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
}

impl Explain for SlotError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoTemplate { .. } => ErrorKind::NotPossible,
            Self::NoUid => ErrorKind::NoSpace,
            Self::Make { source } => source.kind(),
            Self::Stage { source, .. } => source.0.kind(),
            Self::Db(source) => source.kind(),
            Self::Agent { .. } | Self::Pause { .. } | Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Make { source } => source.hints(),
            Self::Stage { source, .. } => source.0.hints(),
            Self::Db(source) => source.hints(),
            _ => vec!["look at the daemon's log, and run `offshoot doctor`".into()],
        }
    }
}

impl From<MakeError> for SlotError {
    fn from(source: MakeError) -> Self {
        Self::Make {
            source: Box::new(source),
        }
    }
}

impl Slots {
    /// Makes one for a kind of VM. Whatever goes wrong, nothing of it is left.
    pub(super) async fn make(
        self: &Arc<Self>,
        core: &Arc<Core>,
        kind: &CreateRequest,
    ) -> Result<Slot, SlotError> {
        let id = VmId::from_bytes(&offshoot_sys::random::bytes::<8>().map_err(io("an id"))?);
        let uid = self.free_uid(core).await?;
        self.state().known.insert(id.clone());
        let known = Known {
            slots: Arc::clone(self),
            id: id.clone(),
            uid,
        };
        let record = Arc::new(nobody(kind, &id, uid)?);
        self.make_as(core, &record, known).await
    }

    /// A user that no VM has; from the end of the range, where VMs come last.
    async fn free_uid(&self, core: &Core) -> Result<u32, SlotError> {
        let config = &core.parts.config;
        for uid in (config.uid_base..config.uid_base.saturating_add(config.uid_count)).rev() {
            if self.has_uid(uid) {
                continue;
            }
            // The first id from there on that no VM has is that one.
            let free = core.parts.db.call(move |db| db.free_uid(uid, 1)).await?;
            if free == Some(uid) && self.state().uids.insert(uid) {
                return Ok(uid);
            }
        }
        Err(SlotError::NoUid)
    }

    async fn make_as(
        self: &Arc<Self>,
        core: &Arc<Core>,
        record: &Arc<VmRecord>,
        known: Known,
    ) -> Result<Slot, SlotError> {
        let id = &record.id;
        let paths = core.parts.paths(id);
        let all = core.parts.capabilities.iter();
        let capabilities: Vec<_> = all
            .filter(|capability| CONCERNS.contains(&capability.name()))
            .cloned()
            .collect();
        let mut plan = empty_plan(id.clone());
        for capability in &capabilities {
            capability
                .plan(record, &paths, &mut plan)
                .map_err(|source| failed(capability.name(), "plan", source))?;
        }
        if matches!(record.definition.config.network.network, NetworkChoice::On(_)) {
            plan.launch.nets.push(NetPlan {
                backend: NetBackend::TapFd(TapSlot::default()),
                mac: MAC,
            });
        }
        let (loaded, saved) = self.template(core, record, &plan.launch).await?;
        let key = match &core.parts.templates {
            Some(templates) => templates.key(record, &plan.launch).await,
            None => Err("there are no templates".into()),
        };
        let key = key.map_err(|reason| SlotError::NoTemplate { reason })?;
        plan.launch.origin = Origin::Template(saved.clone());
        let (owner, objects) = (id.clone(), plan.objects.clone());
        core.parts
            .db
            .call(move |db| db.put_objects(&owner, &objects))
            .await?;
        let output = OutputLog::open(&paths.output()).map_err(io("the output log"))?;
        let run = Arc::new(Run::new(Arc::clone(record), paths.clone(), plan, output));
        let subject = Subject::named(record.definition.config.image.clone());
        let mut stages = core.operations.begin("slot", subject);
        let mut begun = 0;
        match warm_up(core, &capabilities, &run, &mut begun, &mut stages).await {
            Ok(warm) => Ok(Slot {
                record: Arc::clone(record),
                key,
                template: loaded.id.clone(),
                saved,
                paths,
                warm,
                taken: None,
                run,
                capabilities,
                _known: known,
            }),
            Err(error) => {
                stages.undone();
                undo(core, &capabilities[..begun], &run).await;
                // A guest that does not answer is no better the next time.
                if let (SlotError::Agent { .. }, Some(templates)) = (&error, &core.parts.templates) {
                    templates.failed(&loaded.id).await;
                }
                Err(error)
            }
        }
    }

    /// What it is restored from; made where there is none.
    async fn template(
        &self,
        core: &Arc<Core>,
        record: &VmRecord,
        launch: &offshoot_vmm::LaunchPlan,
    ) -> Result<(Arc<LoadedTemplate>, SavedGuest), SlotError> {
        let templates = core
            .parts
            .templates
            .as_ref()
            .ok_or_else(|| SlotError::NoTemplate {
                reason: "this daemon has no templates".into(),
            })?;
        let reason = match templates.offer(record, launch).await {
            Offer::Template { loaded, saved } => return Ok((loaded, saved)),
            Offer::Cold {
                wanted: Some(key), ..
            } => {
                templates.make(core, record, &key).await?;
                match templates.offer(record, launch).await {
                    Offer::Template { loaded, saved } => return Ok((loaded, saved)),
                    Offer::Cold { reason, .. } => reason,
                }
            }
            Offer::Cold { reason, .. } => reason,
        };
        Err(SlotError::NoTemplate { reason })
    }
}

/// Restores it, mounts its disks, runs the first command, and lets it stand still. `begun` says how many capabilities are to be
/// stopped.
async fn warm_up(
    core: &Core,
    capabilities: &[Arc<dyn Capability>],
    run: &Run,
    begun: &mut usize,
    stages: &mut Stages,
) -> Result<Warm, SlotError> {
    for capability in capabilities {
        if capability.name() == "vmm" {
            open_taps(core, run)?;
        }
        *begun += 1;
        let name = format!("{}.prepare", capability.name());
        let prepared = stages.stage(&name, capability.prepare(run)).await;
        prepared.map_err(|source| failed(capability.name(), "prepare", source))?;
    }
    let machine = run.machine().ok_or(MakeError::Shape)?;
    let agent = stages.stage("answer", first_word(&*machine, BOOT)).await?;
    run.booted.cancel();
    let warmed = stages.stage("warm", agent.warm(like(run)?)).await;
    warmed.map_err(|source| SlotError::Agent { source })?;
    let ran = stages.stage("first-command", first_command(&agent)).await;
    ran.map_err(|source| SlotError::Agent { source })?;
    let paused = stages.stage("pause", machine.pause()).await;
    paused.map_err(|source| SlotError::Pause { source })?;
    Ok(Warm { machine, agent })
}

/// What the VM that is to come has in common with it: root and disks. It is nobody.
fn like(run: &Run) -> Result<v1::ConfigureRequest, SlotError> {
    let mut entropy = vec![0; 64];
    offshoot_sys::random::fill(&mut entropy).map_err(io("random bytes"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(v1::ConfigureRequest {
        hostname: "localhost".into(),
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        entropy: entropy.into(),
        ..run.plan.guest.clone()
    })
}

/// Runs it to its end. An image that has no such program is as warm as it can be.
async fn first_command(agent: &AgentClient) -> Result<(), CallError> {
    let mut session = agent
        .exec(v1::Process {
            argv: vec![FIRST.into()],
            ..v1::Process::default()
        })
        .await?;
    while let Some(event) = session.events.next().await {
        if let ProcessEvent::Exited { .. } = event? {
            break;
        }
    }
    Ok(())
}

impl Slot {
    /// Ends it; nothing of it is left.
    pub(crate) async fn end(self, core: &Core) {
        undo(core, &self.capabilities, &self.run).await;
    }

    /// Lets go of what watches over it as a slot: from now on the run of its VM does.
    pub(crate) fn hand_over(&self) {
        self.run.over.cancel();
    }
}

async fn undo(core: &Core, capabilities: &[Arc<dyn Capability>], run: &Run) {
    run.set_ending(Ending::Kill);
    for capability in capabilities.iter().rev() {
        if let Err(error) = capability.stop(run).await {
            let causes = chain(&StageFailure(error));
            tracing::warn!(
                stage = format!("{}.stop", capability.name()),
                ?causes,
                "while a warm slot ends"
            );
        }
    }
    run.over.cancel();
    let (paths, id) = (run.paths.clone(), run.vm.id.clone());
    let swept = tokio::task::spawn_blocking(move || {
        remove_tree(paths.run()).and_then(|()| remove_tree(paths.data()))
    });
    if let Ok(Err(error)) = swept.await {
        tracing::warn!(%error, "cannot delete the files of a warm slot");
    }
    if let Err(error) = core.parts.db.call(move |db| db.put_objects(&id, &[])).await {
        tracing::warn!(%error, "cannot forget what a warm slot had");
    }
}

/// A VM of this kind that is nobody.
fn nobody(kind: &CreateRequest, id: &VmId, uid: u32) -> Result<VmRecord, SlotError> {
    let name: VmName = format!("slot-{id}").parse().map_err(|_| SlotError::NoTemplate {
        reason: "it cannot be named".into(),
    })?;
    Ok(VmRecord {
        id: id.clone(),
        name,
        uid,
        image_digest: kind.image_digest,
        base_id: kind.base_id.clone(),
        kernel_id: kind.kernel_id.clone(),
        definition: VmDefinition {
            config: kind.config.clone(),
            process: None,
            stop_signal: offshoot_sys::signal::TERM,
            vmm: kind.vmm.clone(),
            root: kind.root.clone(),
            attachment: None,
        },
        created_ms: now_ms(),
        life: Life::new(),
    })
}

fn failed(capability: &str, hook: &str, source: CapabilityError) -> SlotError {
    SlotError::Stage {
        stage: format!("{capability}.{hook}"),
        source: StageFailure(source),
    }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> SlotError {
    move |source| SlotError::Io { what, source }
}
