//! Warm slots: VMs that are restored, mounted and warm, but nobody's yet, and stand still. A new VM of their kind takes one
//! over: its id, its folders, its VMM, its disks.
//!
//! ```text
//! make:   restore ─► agent mounts the disks ─► one command runs ─► paused            (in the background, by turns)
//! take:   row of the VM with the slot's id ─► start: hooks find their work done ─► resumed ─► made this VM
//!            └─ not started soon, or of no use ─► ended; the VM starts as any other
//! ```
//!
//! A slot has no row: until it is taken it is known to this process alone, and a daemon that comes after this one finds what
//! belongs to no VM, and removes it.
//!
//! `fit` says which VM may become of which slot; `make` makes them. Not here: which images have slots, and how many (the
//! daemon's settings).

mod fit;
mod make;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use offshoot_agent_proto::client::AgentClient;
use offshoot_model::{TemplateId, VmId};
use offshoot_vmm::Machine;
use offshoot_vmm::plan::SavedGuest;
use tokio::sync::Notify;

use crate::capability::Capability;
use crate::definition::VmRecord;
use crate::engine::{Core, CreateRequest};
use crate::measure;
use crate::paths::VmPaths;
use crate::run::Run;
use crate::templates::manifest::TemplateKey;
use fit::fits;

pub use make::SlotError;

/// A VM that took a slot and is not started within this time gives it back.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long nobody must have created or started a VM before a slot is made.
const QUIET: Duration = Duration::from_millis(500);

/// What a taken slot hands over to the run of its VM.
#[derive(Clone)]
pub(crate) struct Warm {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) agent: AgentClient,
}

/// A VM that is nobody's yet.
pub(crate) struct Slot {
    /// As nobody.
    pub(crate) record: Arc<VmRecord>,
    /// What the VM that takes it must have in common with it.
    pub(crate) key: TemplateKey,
    /// Where it was restored from.
    pub(crate) template: TemplateId,
    /// The same, for the plan.
    pub(crate) saved: SavedGuest,
    /// Where its files lie.
    pub(crate) paths: VmPaths,
    pub(crate) warm: Warm,
    /// When it was taken.
    pub(crate) taken: Option<Instant>,
    run: Arc<Run>,
    capabilities: Vec<Arc<dyn Capability>>,
    _known: Known,
}

/// As long as this is there, id and user are known to be in use.
struct Known {
    slots: Arc<Slots>,
    id: VmId,
    uid: u32,
}

impl Drop for Known {
    fn drop(&mut self) {
        let mut state = self.slots.state();
        state.known.remove(&self.id);
        state.uids.remove(&self.uid);
    }
}

/// One slot as it is shown.
#[derive(Clone, Debug)]
pub struct SlotInfo {
    /// The id that a VM will have.
    pub id: VmId,
    /// As nobody.
    pub record: Arc<VmRecord>,
    /// Where its files lie.
    pub paths: VmPaths,
    /// The VMM's process.
    pub pid: u32,
}

#[derive(Default)]
struct State {
    ready: Vec<Slot>,
    /// Ids and users of slots that are made, ready or taken but not started.
    known: HashSet<VmId>,
    uids: HashSet<u32>,
    /// When a VM was created last.
    asked: Option<Instant>,
    /// No more are made.
    ended: bool,
}

/// All slots of one daemon.
#[derive(Default)]
pub struct Slots {
    state: Mutex<State>,
    /// One was taken.
    taken: Notify,
    /// One at a time is made or ended.
    turn: tokio::sync::Mutex<()>,
}

impl Slots {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an id is a slot's.
    pub(crate) fn knows(&self, id: &VmId) -> bool {
        self.state().known.contains(id)
    }

    /// Whether a user is a slot's.
    pub(crate) fn has_uid(&self, uid: u32) -> bool {
        self.state().uids.contains(&uid)
    }

    /// A slot that the VM can take over, taken out.
    pub(crate) fn take(&self, asked: &CreateRequest) -> Option<Slot> {
        let mut state = self.state();
        state.asked = Some(Instant::now());
        if state.ready.is_empty() {
            return None;
        }
        let place = state.ready.iter().position(|slot| fits(&slot.record, asked));
        measure::slot_claim(place.is_some());
        self.taken.notify_one();
        let mut slot = state.ready.remove(place?);
        slot.taken = Some(Instant::now());
        Some(slot)
    }

    /// Waits until one is taken.
    pub async fn taken(&self) {
        self.taken.notified().await;
    }

    /// Those that are ready.
    pub fn list(&self) -> Vec<SlotInfo> {
        let info = |slot: &Slot| SlotInfo {
            id: slot.record.id.clone(),
            record: Arc::clone(&slot.record),
            paths: slot.paths.clone(),
            pid: slot.warm.machine.state().process.pid,
        };
        self.state().ready.iter().map(info).collect()
    }

    /// Makes slots until there are so many for each of these kinds of VM, in peace, and ends those of other kinds, that are too
    /// many or that died. The first error is told; what it keeps from being made is tried again with the next call.
    pub(crate) async fn fill(
        self: &Arc<Self>,
        core: &Arc<Core>,
        wanted: &[(CreateRequest, usize)],
    ) -> Result<(), SlotError> {
        for slot in self.take_out(wanted) {
            slot.end(core).await;
        }
        let mut result = Ok(());
        for (kind, count) in wanted {
            while self.count(kind) < *count {
                self.wait_for_peace(core).await;
                let _turn = self.turn.lock().await;
                if self.state().ended {
                    return result;
                }
                let slot = match self.make(core, kind).await {
                    Ok(slot) => slot,
                    Err(error) => {
                        // The other kinds are none the worse for it.
                        result = result.and(Err(error));
                        break;
                    }
                };
                let late = {
                    let mut state = self.state();
                    if state.ended {
                        Some(slot)
                    } else {
                        state.ready.push(slot);
                        None
                    }
                };
                if let Some(slot) = late {
                    slot.end(core).await;
                }
            }
        }
        result
    }

    fn count(&self, kind: &CreateRequest) -> usize {
        let state = self.state();
        state.ready.iter().filter(|slot| fits(&slot.record, kind)).count()
    }

    /// Those that nobody wants.
    fn take_out(&self, wanted: &[(CreateRequest, usize)]) -> Vec<Slot> {
        let mut left: Vec<_> = wanted.iter().map(|(kind, count)| (kind, *count)).collect();
        let mut state = self.state();
        let (mut kept, mut out) = (Vec::new(), Vec::new());
        for slot in std::mem::take(&mut state.ready) {
            let alive = slot.warm.machine.state().process.is_alive();
            let place = left
                .iter_mut()
                .find(|(kind, count)| *count > 0 && fits(&slot.record, kind));
            match place {
                Some((_, count)) if alive => {
                    *count -= 1;
                    kept.push(slot);
                }
                _ => out.push(slot),
            }
        }
        state.ready = kept;
        out
    }

    /// Waits until no VM is being created or started.
    async fn wait_for_peace(&self, core: &Core) {
        loop {
            if let Some(templates) = &core.parts.templates {
                templates.wait_for_starts().await;
            }
            let asked = self.state().asked;
            match asked.map(|asked| asked.elapsed()) {
                Some(since) if since < QUIET => tokio::time::sleep(QUIET - since).await,
                _ => return,
            }
        }
    }

    /// Ends every slot; no more are made.
    pub(crate) async fn end(&self, core: &Core) {
        self.state().ended = true;
        let _turn = self.turn.lock().await;
        let all = std::mem::take(&mut self.state().ready);
        for slot in all {
            slot.end(core).await;
        }
    }
}
