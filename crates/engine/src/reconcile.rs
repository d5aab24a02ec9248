//! Mending what is against what should be, at the start of the daemon and every minute.
//!
//! ```text
//! rows of VMs      ─► each owner looks after its own VM (`Request::Tend`)
//! things of no VM  ─► the capability that makes such things removes them
//! rows of things   ─► forgotten once the thing is gone
//! ```
//!
//! A thing belongs to no VM when its id is none that the engine knows *after* the thing was seen: a VM is known before
//! anything of it is made and until all of it is gone, and ids are never used again.

use std::time::Duration;

use offshoot_model::{EventAction, KernelObject, ObjectKind, VmId};
use offshoot_store::db::{Db, NewEvent};

use crate::capability::Capability;
use crate::engine::Engine;
use crate::error::StageFailure;
use crate::operation;
use crate::owner::{Request, chain, now_ms};

/// A VM that does not answer within this time is in the middle of something and looks after itself.
const BUSY: Duration = Duration::from_secs(2);

impl Engine {
    /// Looks once, mends what it can, and tells what it did, one line each.
    pub async fn reconcile(&self) -> Vec<String> {
        operation::within(operation::new_id(), async {
            self.tend_all().await;
            if let Some(templates) = self.templates() {
                templates.unload_idle();
            }
            self.remove_leftovers().await
        })
        .await
    }

    async fn tend_all(&self) {
        for handle in self.list() {
            let _ = tokio::time::timeout(BUSY, handle.ask(Request::Tend)).await;
        }
    }

    /// What lies about on this host that belonged to a VM of ours and belongs to none now.
    pub async fn leftovers(&self) -> Vec<KernelObject> {
        let mut found = Vec::new();
        for capability in self.capabilities().iter().rev() {
            found.extend(capability.leftovers(&|id| self.knows(id)).await);
        }
        found
    }

    pub(crate) async fn remove_leftovers(&self) -> Vec<String> {
        let mut done = Vec::new();
        // Backwards, as at the end of a run: processes go before the folders that say which they are.
        for capability in self.capabilities().iter().rev() {
            for object in capability.leftovers(&|id| self.knows(id)).await {
                match capability.remove_leftover(&object).await {
                    Ok(()) => done.push(format!("removed the {} {}", object.kind, object.name)),
                    Err(error) => {
                        let causes = chain(&StageFailure(error));
                        tracing::warn!(kind = %object.kind, name = object.name, ?causes, "cannot remove a leftover");
                    }
                }
            }
        }
        self.forget_what_is_gone().await;
        for line in &done {
            let event = NewEvent {
                time_ms: now_ms(),
                action: EventAction::Repair,
                vm_id: None,
                vm_name: None,
                operation: operation::current(),
                reason: line.clone(),
            };
            if let Err(error) = self.events().record(event).await {
                tracing::warn!(%error, line, "cannot keep an event");
            }
        }
        done
    }

    /// Rows of things whose VM is gone, and which are gone themselves.
    async fn forget_what_is_gone(&self) {
        let rows = match self.db().call(Db::objects).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(%error, "cannot look at what is recorded");
                return;
            }
        };
        for row in rows {
            if self.knows(&row.vm_id) || exists(&row.object) {
                continue;
            }
            let forgotten = self.db().call(move |db| db.remove_object(&row.object)).await;
            if let Err(error) = forgotten {
                tracing::warn!(%error, "cannot forget a thing that is gone");
            }
        }
    }

    fn capabilities(&self) -> &[std::sync::Arc<dyn Capability>] {
        &self.parts().capabilities
    }

    /// Whether there is such a VM, or one that becomes a template or waits for somebody.
    pub fn knows(&self, id: &VmId) -> bool {
        let becomes = |templates: &std::sync::Arc<crate::templates::Templates>| templates.is_maker(id);
        self.slots().knows(id) || self.templates().is_some_and(becomes) || self.find_id(id).is_some()
    }
}

/// Whether a recorded thing is there: the name of each is a path that is there as long as it is. Interfaces and tables have none; who
/// removes leftovers asks the kernel for them and needs no record.
fn exists(object: &KernelObject) -> bool {
    match object.kind {
        ObjectKind::Tap | ObjectKind::Bridge | ObjectKind::NftTable => false,
        ObjectKind::Folder | ObjectKind::Process | ObjectKind::Cgroup => {
            std::path::Path::new(&object.name).exists()
        }
    }
}
