//! All VMs of one daemon.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use offshoot_model::{
    Attachment, BaseId, ConfigError, Digest, EventAction, Finding, ImageConfig, KernelId, ProcessConfig,
    VmConfig, VmId, VmName,
};
use offshoot_store::db::{Db, DbError, NewEvent};

use crate::capability::Capability;
use crate::definition::{Choice, Life, VmDefinition, VmRecord};
use crate::error::VmError;
use crate::events::EventLog;
use crate::networks::{self, Changing, Networks};
use crate::operation::{self, Stages, Subject};
use crate::operation_log::OperationLog;
use crate::output::OutputLog;
use crate::owner::{Beginning, Owner, VmHandle, now_ms};
use crate::paths::VmPaths;
use crate::preflight::Preflight;
use crate::slots::{Slot, SlotError, Slots};
use crate::templates::Templates;

/// The numbers and folders an engine works with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where sockets lie.
    pub run_dir: PathBuf,
    /// The first user id for VMMs; each VM gets one of its own.
    pub uid_base: u32,
    /// How many there are.
    pub uid_count: u32,
    /// The group that may pass through our folders and read bases and kernels.
    pub gid: u32,
}

/// What an engine is put together from. The daemon makes it: it alone names back ends.
pub struct Parts {
    /// The database.
    pub db: Db,
    /// Numbers and folders.
    pub config: EngineConfig,
    /// The networks that VMs are on.
    pub networks: Networks,
    /// What every VM is put together from, in the order they start.
    pub capabilities: Vec<Arc<dyn Capability>>,
    /// What VMs are restored from; absent where all boot their kernels.
    pub templates: Option<Arc<Templates>>,
}

impl Parts {
    /// Where the files of `id` lie.
    pub fn paths(&self, id: &VmId) -> VmPaths {
        VmPaths::new(&self.config.data_dir, &self.config.run_dir, id)
    }
}

/// What all owners share.
pub(crate) struct Core {
    pub(crate) parts: Parts,
    pub(crate) events: EventLog,
    pub(crate) operations: OperationLog,
    pub(crate) preflight: Preflight,
    /// VMs that are nobody's yet.
    pub(crate) slots: Arc<Slots>,
    /// Turns to look for what an earlier run left.
    pub(crate) looking: tokio::sync::Semaphore,
}

/// A VM to create, with everything decided that needs images, kernels and hosts to decide.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The client's request.
    pub config: VmConfig,
    /// What its image says to run.
    pub image_config: ImageConfig,
    /// Its image's manifest.
    pub image_digest: Digest,
    /// Its base, which exists.
    pub base_id: BaseId,
    /// Its kernel bundle, which exists.
    pub kernel_id: KernelId,
    /// Which VMM.
    pub vmm: Choice,
    /// Which root back end.
    pub root: Choice,
}

/// How many VMs are looked for at once after a start. Each takes a few milliseconds of processor, and clients have their
/// turn between them: with a thousand at once the first answer came when the last was found.
const LOOKS_AT_ONCE: usize = 8;

/// The handles of all VMs.
#[derive(Default)]
pub(crate) struct Registry {
    handles: RwLock<HashMap<VmId, VmHandle>>,
}

impl Registry {
    pub(crate) fn forget(&self, id: &VmId) {
        self.handles
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
    }

    fn add(&self, id: VmId, handle: VmHandle) {
        self.handles
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, handle);
    }

    /// One VM for which this holds, as it is now. Copies nothing else: it is asked for every look-up of a name.
    pub(crate) fn find_record(&self, holds: impl Fn(&VmRecord) -> bool) -> Option<Arc<VmRecord>> {
        let handles = self.handles.read().unwrap_or_else(PoisonError::into_inner);
        handles.values().find_map(|handle| {
            let view = handle.view.borrow();
            holds(&view).then(|| Arc::clone(&view))
        })
    }
}

/// All VMs of one daemon. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    core: Arc<Core>,
    registry: Arc<Registry>,
    /// Choosing a free user id and writing the row that takes it must not be interleaved.
    creating: Arc<tokio::sync::Mutex<()>>,
}

impl Engine {
    /// Reads all VMs from the database, removes what belongs to none, and looks for those that run.
    /// Returns before they are all found: each is looked for by its own task.
    pub async fn start(parts: Parts) -> Result<Self, EngineStartError> {
        make_folders(&parts.config)?;
        let core = Arc::new(Core {
            events: EventLog::new(parts.db.clone()),
            operations: OperationLog::new(parts.db.clone()),
            preflight: Preflight::new(parts.capabilities.clone()),
            slots: Arc::default(),
            looking: tokio::sync::Semaphore::new(LOOKS_AT_ONCE),
            parts,
        });
        let records = core
            .parts
            .db
            .call(|db| {
                db.vms()?
                    .into_iter()
                    .map(VmRecord::from_row)
                    .collect::<Result<Vec<_>, _>>()
            })
            .await?;
        let registry = Arc::new(Registry::default());
        for record in records {
            let id = record.id.clone();
            let path = core.parts.paths(&id).output();
            let output = OutputLog::open(&path).map_err(|source| EngineStartError::Io { path, source })?;
            let handle = Owner::spawn(
                Arc::clone(&core),
                Arc::clone(&registry),
                record,
                output,
                Beginning::Found,
            );
            registry.add(id, handle);
        }
        let engine = Self {
            core,
            registry,
            creating: Arc::default(),
        };
        for line in engine.remove_leftovers().await {
            tracing::info!("{line}");
        }
        Ok(engine)
    }

    /// Creates a VM: checks the request, chooses name and user id, writes the row. Nothing runs yet, no file exists.
    pub async fn create(&self, request: CreateRequest) -> Result<VmHandle, VmError> {
        let subject = Subject::named(request.config.image.clone());
        self.create_within(request, self.core.operations.begin("create", subject))
            .await
    }

    /// The same, as the last stages of an operation that began before.
    pub async fn create_within(&self, request: CreateRequest, stages: Stages) -> Result<VmHandle, VmError> {
        request.config.validate().map_err(VmError::Config)?;
        let process = if request.config.init {
            None
        } else {
            Some(
                request
                    .config
                    .main_process(&request.image_config)
                    .map_err(VmError::Config)?,
            )
        };
        let stop_signal = stop_signal(&request.image_config.stop_signal)?;
        let mut slot = self.core.slots.take(&request).map(Box::new);
        let created = self
            .create_in(&mut slot, request, process, stop_signal, stages)
            .await;
        // What did not become a VM.
        if let Some(slot) = slot {
            slot.end(&self.core).await;
        }
        created
    }

    /// The same, once it is known what it runs; in a warm slot, where there is one for it, which is taken out.
    async fn create_in(
        &self,
        slot: &mut Option<Box<Slot>>,
        request: CreateRequest,
        process: Option<ProcessConfig>,
        stop_signal: u32,
        mut stages: Stages,
    ) -> Result<VmHandle, VmError> {
        let id = match slot {
            Some(slot) => slot.record.id.clone(),
            None => VmId::from_bytes(&random::<8>()?),
        };
        let creating = stages.step("turn", self.creating.lock()).await;
        let name = match &request.config.name {
            Some(name) => name.clone(),
            None => self.free_name()?,
        };
        let (base, count) = (self.core.parts.config.uid_base, self.core.parts.config.uid_count);
        let uid = stages
            .stage("uid", async {
                if let Some(slot) = slot {
                    return Ok(slot.record.uid);
                }
                let free = self.db().call(move |db| db.free_uid(base, count)).await?;
                let free = free.filter(|uid| !self.core.slots.has_uid(*uid));
                free.ok_or(VmError::NoUid { count })
            })
            .await?;
        // Held until the row is written that takes the address.
        let (changing, attachment) = stages
            .stage("network", async {
                let changing = self.networks().change().await;
                let attachment = self.attach(&changing, &request.config).await?;
                Ok::<_, VmError>((changing, attachment))
            })
            .await?;
        let address = attachment.as_ref().map(networks::address_row);
        let record = VmRecord {
            id: id.clone(),
            name,
            uid,
            image_digest: request.image_digest,
            base_id: request.base_id,
            kernel_id: request.kernel_id,
            definition: VmDefinition {
                config: request.config,
                process,
                stop_signal,
                vmm: request.vmm,
                root: request.root,
                attachment,
            },
            created_ms: now_ms(),
            life: Life::new(),
        };
        // The last thing that can fail: from here on there is such a VM.
        let path = self.core.parts.paths(&id).output();
        let output = OutputLog::open(&path).map_err(|source| VmError::Db(unreadable(source)))?;
        let (row, db) = (record.to_row(), self.db().clone());
        let event = NewEvent {
            time_ms: record.created_ms,
            action: EventAction::Create,
            vm_id: Some(id.clone()),
            vm_name: Some(record.name.clone()),
            operation: operation::current(),
            reason: record.definition.config.image.clone(),
        };
        let events = stages
            .stage(
                "row",
                db.call(move |db| db.insert_vm(&row, address.as_ref(), &[event])),
            )
            .await?;
        drop(changing);
        stages.set_subject(Subject {
            vm: Some(id.clone()),
            name: record.name.to_string(),
        });
        let handle = Owner::spawn(
            Arc::clone(&self.core),
            Arc::clone(&self.registry),
            record,
            output,
            Beginning::New(slot.take()),
        );
        self.registry.add(id, handle.clone());
        drop(creating);
        self.core.events.announce(&events);
        Ok(handle)
    }

    /// The VM with this name, id, or the only one whose id begins so.
    pub fn find(&self, name: &str) -> Result<VmHandle, VmError> {
        let handles = self
            .registry
            .handles
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut prefixed = Vec::new();
        for (id, handle) in handles.iter() {
            if handle.view.borrow().name.as_str().eq_ignore_ascii_case(name) || id.as_str() == name {
                return Ok(handle.clone());
            }
            // Shorter ones would be a name that was mistyped, not an id.
            if name.len() >= 3 && id.as_str().starts_with(name) {
                prefixed.push(handle);
            }
        }
        match prefixed.as_slice() {
            [handle] => Ok((*handle).clone()),
            [] => Err(VmError::NotFound {
                name: name.chars().take(64).collect(),
            }),
            _ => Err(VmError::Ambiguous {
                prefix: name.to_owned(),
            }),
        }
    }

    /// Every VM, newest first.
    pub fn list(&self) -> Vec<VmHandle> {
        let handles = self
            .registry
            .handles
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = handles.values().cloned().collect();
        drop(handles);
        list.sort_by_key(|handle| std::cmp::Reverse(handle.view.borrow().created_ms));
        list
    }

    /// Every VM as it is now, newest first.
    pub fn records(&self) -> Vec<Arc<VmRecord>> {
        let handles = self
            .registry
            .handles
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let views = handles.values().map(|handle| Arc::clone(&handle.view.borrow()));
        let mut records: Vec<_> = views.collect();
        drop(handles);
        records.sort_by_key(|vm| std::cmp::Reverse(vm.created_ms));
        records
    }

    /// Who knows all VMs, for those who must not keep the engine alive: the engine keeps them.
    pub(crate) fn registry(&self) -> Weak<Registry> {
        Arc::downgrade(&self.registry)
    }

    /// Every finding of every capability.
    pub async fn check(&self) -> Vec<Finding> {
        self.core.preflight.look().await
    }

    /// The database.
    pub fn db(&self) -> &Db {
        &self.core.parts.db
    }

    /// The networks that VMs are on.
    pub fn networks(&self) -> &Networks {
        &self.core.parts.networks
    }

    /// Where the time of operations went.
    pub fn operations(&self) -> &OperationLog {
        &self.core.operations
    }

    /// What VMs are restored from.
    pub fn templates(&self) -> Option<&Arc<Templates>> {
        self.core.parts.templates.as_ref()
    }

    /// VMs that are nobody's yet.
    pub fn slots(&self) -> &Slots {
        &self.core.slots
    }

    /// Makes warm slots until there are so many for each of these kinds of VM, when no VM is being created or started, and ends
    /// those that nobody wants any more.
    pub async fn fill_slots(&self, wanted: &[(CreateRequest, usize)]) -> Result<(), SlotError> {
        self.core.slots.fill(&self.core, wanted).await
    }

    /// Ends every warm slot; no more are made.
    pub async fn end_slots(&self) {
        self.core.slots.end(&self.core).await;
    }

    /// What happened.
    pub fn events(&self) -> &EventLog {
        &self.core.events
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.core.parts
    }

    /// The VM with this id.
    pub fn find_id(&self, id: &VmId) -> Option<VmHandle> {
        let handles = self.registry.handles.read();
        handles.unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    async fn attach(
        &self,
        changing: &Changing<'_>,
        config: &VmConfig,
    ) -> Result<Option<Attachment>, VmError> {
        let given: Vec<_> = self
            .records()
            .iter()
            .filter_map(|vm| vm.definition.attachment.as_ref())
            .flat_map(|attachment| attachment.publish.iter().copied())
            .collect();
        let attached = self.networks().attach(changing, &config.network, &given).await;
        attached.map_err(VmError::Network)
    }

    fn free_name(&self) -> Result<VmName, VmError> {
        loop {
            let name = crate::names::random_name(&random::<4>()?);
            if self.find(name.as_str()).is_err() {
                return Ok(name);
            }
        }
    }
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineStartError {
    /// A folder or file of ours.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
}

fn random<const N: usize>() -> Result<[u8; N], VmError> {
    offshoot_sys::random::bytes().map_err(VmError::Random)
}

fn unreadable(source: io::Error) -> DbError {
    DbError::Row {
        what: "output log",
        source: Box::new(source),
    }
}

/// The folders that VMMs pass through: theirs is the group, and they cannot list them.
fn make_folders(config: &EngineConfig) -> Result<(), EngineStartError> {
    for (path, mode) in [
        (config.data_dir.join("vms"), 0o710),
        (config.run_dir.join("vms"), 0o710),
    ] {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(&path)
            .and_then(|()| std::os::unix::fs::chown(&path, None, Some(config.gid)))
            .and_then(|()| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)));
        made.map_err(|source| EngineStartError::Io { path, source })?;
    }
    Ok(())
}

/// The Linux number of an image's `StopSignal` (`SIGQUIT`, `QUIT` or `3`); SIGTERM where it names none.
fn stop_signal(text: &str) -> Result<u32, VmError> {
    if text.is_empty() {
        return Ok(offshoot_sys::signal::TERM);
    }
    offshoot_sys::signal::parse(text).ok_or_else(|| VmError::NotPossible {
        what: format!(
            "its image's stop signal `{}` is unknown",
            text.chars().take(40).collect::<String>()
        ),
        hint: "mend the image's StopSignal".into(),
    })
}

impl From<ConfigError> for VmError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error)
    }
}
