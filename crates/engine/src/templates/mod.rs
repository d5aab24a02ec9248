//! Templates: VMs that were booted once and saved. Copies of them go on where they were, each in its own copy of the memory.
//!
//! ```text
//! start ── offer ──┬─ misfit, none yet, damaged ──► boot the kernel, and say why ──► make one, in the background
//!                  └─ loaded (checked, sealed) ───► restore ── fails ──► undo, boot the kernel within the same start
//!
//! make:   a VM of its own (id, uid, folders, control group, TAP), as every VM is started, but for nobody
//!           boots ─► agent rehearses ─► paused ─► saved ─► published ─► gone
//! ```
//!
//! Read in this order: [`fit`] says which VM can be restored; [`manifest`] what it must have in common with the one that was
//! saved; [`store`] where templates lie; `make` makes them. Not here: how a VMM saves and restores (`offshoot_vmm`), what
//! makes a restored guest another VM (the agent's `Configure`).

pub mod fit;
pub mod manifest;
pub mod store;

mod make;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use offshoot_kernel::KernelStore;
use offshoot_model::{ByteSize, Digest, TemplateId, VmId};
use offshoot_rootfs::policy::RootKind;
use offshoot_vmm::plan::SavedGuest;
use offshoot_vmm::{Driver, LaunchPlan};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::definition::VmRecord;
use fit::{Misfit, misfit};
use manifest::{FORMAT, TemplateKey};
use store::{LoadedTemplate, TemplateError, TemplateStore};

pub use make::MakeError;
pub(crate) use make::{BOOT, MAC, first_word, open_taps};

/// A template that nobody used for so long is not kept in memory any more. VMs that were restored from it keep their pages.
const KEPT_LOADED: Duration = Duration::from_secs(15 * 60);

/// So often in a row a template of one kind may turn out to be of no use before no more of them are made.
const MAX_FAILURES: u32 = 2;

/// The daemon's settings.
#[derive(Clone, Debug)]
pub struct TemplateRules {
    /// Whether templates are made by themselves, after VMs that booted their kernel.
    pub background: bool,
    /// The user that the VMMs of templates that are being made run as, one at a time.
    pub uid: u32,
    /// How long a guest that becomes a template may take to its first word, where that is more than it gets in any case.
    pub boot_timeout: Duration,
}

/// Whether and from what a VM is restored.
#[derive(Clone, Debug)]
pub enum Offer {
    /// From this.
    Template {
        /// What was loaded.
        loaded: Arc<LoadedTemplate>,
        /// What the plan's [`Origin`](offshoot_vmm::plan::Origin) is to be.
        saved: SavedGuest,
    },
    /// It boots its kernel.
    Cold {
        /// Why.
        reason: String,
        /// The template that would have done, if only it were there and whole.
        wanted: Option<Box<TemplateKey>>,
        /// What stands in the way for good.
        misfit: Option<Misfit>,
    },
}

/// One template as it is shown to users.
#[derive(Clone, Debug)]
pub struct TemplateInfo {
    /// Which.
    pub id: TemplateId,
    /// What it is, or why it cannot be used.
    pub stored: Result<store::StoredTemplate, String>,
    /// Why no VM of this host will be restored from it any more.
    pub stale: Option<String>,
    /// What it takes on disk, bytes.
    pub disk: ByteSize,
    /// What the daemon holds of it in memory, bytes.
    pub held: ByteSize,
}

#[derive(Default)]
struct State {
    loaded: HashMap<TemplateId, (Arc<LoadedTemplate>, Instant)>,
    /// VMs that are made into templates now.
    makers: HashSet<VmId>,
    /// Who waits for whom: one maker for each kind.
    turns: HashMap<TemplateId, Arc<tokio::sync::Mutex<()>>>,
    failures: HashMap<TemplateId, u32>,
    /// The VMMs that were found on this host.
    vmms: BTreeMap<String, HostVmm>,
}

/// A VMM on this host, as a template's key names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HostVmm {
    version: String,
    build: Digest,
}

/// All templates of one daemon.
pub struct Templates {
    /// Where they lie.
    pub store: TemplateStore,
    drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
    kernels: Arc<KernelStore>,
    rules: TemplateRules,
    processor: Digest,
    state: Mutex<State>,
    /// How many VMs are being started.
    starts: watch::Sender<usize>,
    /// One VM at a time is made into a template: it has the one user.
    turn: tokio::sync::Mutex<()>,
    /// Nothing new is made, and what is being made is undone.
    ending: CancellationToken,
}

/// Held while a VM is being started: templates wait.
pub(crate) struct Starting<'a>(&'a Templates);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starts.send_modify(|starts| *starts -= 1);
    }
}

impl Templates {
    /// Those of one data directory.
    pub fn open(
        data_dir: &Path,
        drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
        kernels: Arc<KernelStore>,
        rules: TemplateRules,
    ) -> std::io::Result<Self> {
        Ok(Self {
            store: TemplateStore::open(data_dir)?,
            drivers,
            kernels,
            rules,
            processor: processor(),
            state: Mutex::default(),
            starts: watch::Sender::new(0),
            turn: tokio::sync::Mutex::default(),
            ending: CancellationToken::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that a VM is being started, until the answer is dropped.
    pub(crate) fn starting(&self) -> Starting<'_> {
        self.starts.send_modify(|starts| *starts += 1);
        Starting(self)
    }

    /// Waits until no VM is being started.
    pub(crate) async fn wait_for_starts(&self) {
        // The sender lives as long as `self`.
        let _ = self.starts.subscribe().wait_for(|starts| *starts == 0).await;
    }

    /// Whether an id is that of a VM which is made into a template now.
    pub(crate) fn is_maker(&self, id: &VmId) -> bool {
        self.state().makers.contains(id)
    }

    /// Makes no more templates and undoes what is under way; returns when nothing of it is left.
    pub async fn end(&self) {
        self.ending.cancel();
        drop(self.turn.lock().await);
    }

    /// What a VM of this plan must have in common with a saved one; the reason where it cannot be told or its VMM cannot save.
    pub(crate) async fn key(&self, vm: &VmRecord, launch: &LaunchPlan) -> Result<TemplateKey, String> {
        let vmm = vm.definition.vmm.chosen.as_str();
        let driver = self
            .drivers
            .get(vmm)
            .ok_or_else(|| format!("there is no driver for {vmm}"))?;
        let facts = driver.probe().await.map_err(|error| error.to_string())?;
        let found = HostVmm::of(&facts);
        self.state().vmms.insert(facts.kind.clone(), found.clone());
        let shape = driver.shape(launch).await.map_err(|error| error.to_string())?;
        let shape = shape.ok_or_else(|| format!("{vmm} cannot save VMs"))?;
        let kernel = self
            .kernels
            .get(&vm.kernel_id)
            .map_err(|error| error.to_string())?;
        Ok(TemplateKey {
            format: FORMAT,
            base: vm.base_id.clone(),
            kernel: vm.kernel_id.clone(),
            agent: kernel.manifest.agent.digest,
            vmm: facts.kind,
            vmm_version: found.version,
            vmm_build: found.build,
            processor: self.processor,
            cpus: launch.cpus,
            memory_mib: launch.memory.mib(),
            root: vm.definition.root.chosen.clone(),
            network: !launch.nets.is_empty(),
            shape: Digest::from_bytes(Sha256::digest(shape.as_bytes()).into()),
        })
    }

    /// What a VM that is about to start gets. Reads little where the template is loaded already.
    pub(crate) async fn offer(&self, vm: &VmRecord, launch: &LaunchPlan) -> Offer {
        let cold = |reason: String, wanted: Option<TemplateKey>| Offer::Cold {
            reason,
            wanted: wanted.map(Box::new),
            misfit: None,
        };
        let root: RootKind = match vm.definition.root.chosen.parse() {
            Ok(root) => root,
            Err(_) => return cold("its root is of another version".into(), None),
        };
        if let Some(misfit) = misfit(&vm.definition.config, root) {
            return Offer::Cold {
                reason: misfit.reason().into(),
                wanted: None,
                misfit: Some(misfit),
            };
        }
        let key = match self.key(vm, launch).await {
            Ok(key) => key,
            Err(reason) => return cold(reason, None),
        };
        match self.load(&key).await {
            Ok((loaded, saved)) => {
                self.store.mark_used(&loaded.id);
                Offer::Template { loaded, saved }
            }
            Err(TemplateError::NotFound { .. }) => {
                let failed = self.state().failures.get(&key.id()).copied().unwrap_or(0);
                if failed >= MAX_FAILURES {
                    let reason = format!("templates of its kind failed {failed} times");
                    return cold(reason, None);
                }
                cold("there is no template of its kind yet".into(), Some(key))
            }
            Err(error) => {
                if error.is_damage() {
                    tracing::warn!(%error, "removing a template");
                    self.discard(&key.id()).await;
                }
                cold(crate::owner::chain(&error).join(": "), Some(key))
            }
        }
    }

    async fn load(&self, key: &TemplateKey) -> Result<(Arc<LoadedTemplate>, SavedGuest), TemplateError> {
        let id = key.id();
        let known = self.state().loaded.get(&id).map(|(loaded, _)| Arc::clone(loaded));
        let known = known.filter(|loaded| self.store.is_as_loaded(loaded));
        let loaded = match known {
            Some(loaded) => loaded,
            None => {
                self.state().loaded.remove(&id);
                // Once, however many VMs start now.
                let turn = self.turn_of(&id);
                let _turn = turn.lock().await;
                let meanwhile = self.state().loaded.get(&id).map(|(loaded, _)| Arc::clone(loaded));
                match meanwhile.filter(|loaded| self.store.is_as_loaded(loaded)) {
                    Some(loaded) => loaded,
                    None => {
                        let (store, key) = (self.store.clone(), key.clone());
                        Arc::new(blocking(move || store.load(&key)).await?)
                    }
                }
            }
        };
        let entry = (Arc::clone(&loaded), Instant::now());
        self.state().loaded.insert(id, entry);
        let saved = SavedGuest {
            memory: Arc::clone(&loaded.memory),
            state: Arc::clone(&loaded.state),
            disks: loaded.disks.clone(),
        };
        Ok((loaded, saved))
    }

    fn turn_of(&self, id: &TemplateId) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(self.state().turns.entry(id.clone()).or_default())
    }

    /// Removes a template that turned out to be of no use.
    pub(crate) async fn discard(&self, id: &TemplateId) {
        self.state().loaded.remove(id);
        let (store, gone) = (self.store.clone(), id.clone());
        if let Err(error) = blocking(move || store.remove(&gone)).await {
            tracing::warn!(%error, "cannot remove a template");
        }
    }

    /// Notes that a VM could not be restored from a template that looked whole, and removes it.
    pub(crate) async fn failed(&self, id: &TemplateId) {
        *self.state().failures.entry(id.clone()).or_default() += 1;
        self.discard(id).await;
    }

    /// Notes that a VM was restored from a template and works.
    pub(crate) fn worked(&self, id: &TemplateId) {
        self.state().failures.remove(id);
    }

    /// Removes one on request; VMs that were restored from it keep what they have.
    pub async fn remove(self: &Arc<Self>, id: &TemplateId) -> Result<(), TemplateError> {
        let (templates, gone) = (Arc::clone(self), id.clone());
        if blocking(move || templates.remove_now(&gone)).await? {
            Ok(())
        } else {
            Err(TemplateError::NotFound { id: id.clone() })
        }
    }

    /// The same; says whether there was one. Blocks.
    pub fn remove_now(&self, id: &TemplateId) -> Result<bool, TemplateError> {
        self.state().loaded.remove(id);
        self.state().failures.remove(id);
        self.store.remove(id)
    }

    /// Lets go of what nobody used for long.
    pub fn unload_idle(&self) {
        self.state()
            .loaded
            .retain(|_, (_, used)| used.elapsed() < KEPT_LOADED);
    }

    /// Looks which VMMs this host has, for [`Templates::list`]. One that cannot be asked is not known.
    pub async fn look_at_vmms(&self) {
        for driver in self.drivers.values() {
            if let Ok(facts) = driver.probe().await {
                let found = HostVmm::of(&facts);
                self.state().vmms.insert(facts.kind, found);
            }
        }
    }

    /// Every template, with what it takes. What is known of VMMs is what was seen when one was last looked at.
    pub fn list(&self) -> std::io::Result<Vec<TemplateInfo>> {
        let mut all = Vec::new();
        let vmms = self.state().vmms.clone();
        for id in self.store.ids()? {
            let stored = self.store.get(&id).map_err(|error| error.to_string());
            let key = stored.as_ref().ok().map(|stored| &stored.manifest.key);
            let held = self
                .state()
                .loaded
                .get(&id)
                .map_or(0, |(loaded, _)| loaded.held.bytes());
            all.push(TemplateInfo {
                stale: key.and_then(|key| stale(key, &vmms, &self.processor)),
                stored,
                disk: ByteSize::from_bytes(
                    offshoot_sys::space::disk_usage(&self.store.path(&id)).unwrap_or(0),
                ),
                held: ByteSize::from_bytes(held),
                id,
            });
        }
        Ok(all)
    }
}

/// Why no VM of a host with these will be restored from a template of this key.
fn stale(key: &TemplateKey, vmms: &BTreeMap<String, HostVmm>, processor: &Digest) -> Option<String> {
    if key.processor != *processor {
        return Some("it was saved on another processor".into());
    }
    let here = vmms.get(&key.vmm)?;
    if here.version != key.vmm_version {
        return Some(format!(
            "{} {} saved it, and this host has {}",
            key.vmm, key.vmm_version, here.version
        ));
    }
    (here.build != key.vmm_build)
        .then(|| format!("another build of {} {} saved it", key.vmm, key.vmm_version))
}

impl HostVmm {
    fn of(facts: &offshoot_vmm::VmmFacts) -> Self {
        Self {
            version: facts.version.clone(),
            build: build(&facts.program),
        }
    }
}

/// A name for what this host's processor is and can do.
fn processor() -> Digest {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut hash = Sha256::new();
    for field in [
        "vendor_id",
        "cpu family",
        "model\t",
        "model name",
        "stepping",
        "flags",
    ] {
        let line = text.lines().find(|line| line.starts_with(field));
        hash.update(line.unwrap_or_default().as_bytes());
        hash.update(b"\n");
    }
    Digest::from_bytes(hash.finalize().into())
}

/// A name for how a program was built: what changes when it is replaced, be it by one of the same version.
fn build(program: &Path) -> Digest {
    use std::os::unix::fs::MetadataExt as _;
    let looks = std::fs::metadata(program).map(|meta| (meta.len(), meta.mtime(), meta.mtime_nsec()));
    Digest::from_bytes(Sha256::digest(format!("{looks:?}")).into())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_by_another_host_is_stale() {
        let key = manifest::tests::key();
        let here = HostVmm {
            version: key.vmm_version.clone(),
            build: key.vmm_build,
        };
        let told = |vmm: HostVmm, processor: &Digest| {
            let vmms = BTreeMap::from([(key.vmm.clone(), vmm)]);
            stale(&key, &vmms, processor)
        };
        assert_eq!(told(here.clone(), &key.processor), None);
        assert_eq!(
            stale(&key, &BTreeMap::new(), &key.processor),
            None,
            "a VMM that was not looked at is taken for the same"
        );
        let newer = HostVmm {
            version: "8.2.0".into(),
            ..here.clone()
        };
        assert!(told(newer, &key.processor).unwrap().contains("7.2.22"));
        let other = HostVmm {
            build: Digest::from_bytes([9; 32]),
            ..here.clone()
        };
        assert!(told(other, &key.processor).unwrap().contains("another build"));
        let elsewhere = Digest::from_bytes([9; 32]);
        assert!(told(here, &elsewhere).unwrap().contains("processor"));
    }
}
