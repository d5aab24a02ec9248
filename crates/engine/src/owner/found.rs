//! Finding out what became of a VM: after a restart of the daemon, and whenever a look is due.

use std::sync::Arc;
use std::time::Duration;

use offshoot_model::{EventAction, ExitReason, VmState};
use tokio::sync::watch;

use super::{IN_PEACE, Owner, chain, slots};
use crate::error::{StageFailure, VmError};
use crate::restart;
use crate::run::{Ending, Live, Run, empty_plan};

impl Owner {
    /// Brings a VM whose row was written by an earlier daemon, or whose run was lost sight of, to a state that is true.
    ///
    /// ```text
    /// removing                 ─► end it, remove it
    /// running, paused, found   ─► go on with it
    /// stopping, found          ─► stop it in peace
    /// starting, or not found   ─► end what is left; it was lost
    /// does not run             ─► restart policy, `--rm`
    /// ```
    pub(super) async fn adopt(&mut self) {
        let state = self.record.life.state;
        let config = &self.record.definition.config;
        if !state.has_vmm() && !self.record.life.removing {
            if config.auto_remove && state != VmState::Created {
                let removed = self.remove().await;
                self.log_failure("cannot remove a VM that was started with --rm", removed);
            } else if restart::with_the_daemon(config.restart, &self.record.life) {
                self.restart_at = Some(tokio::time::Instant::now());
            }
            // A VM that took over a warm slot and was not started has its VMM.
            if !self.removed {
                self.tend().await;
            }
            return;
        }
        let (run, whole) = self.find_run().await;
        let there = run.machine().is_some();
        self.run = Some(Arc::clone(&run));
        if self.record.life.removing {
            let ended = self.end(Ending::Discard, ExitReason::Killed).await;
            self.log_failure("cannot end a VM that is being removed", ended);
            let removed = self.remove().await;
            self.log_failure("cannot finish the removal of a VM", removed);
            return;
        }
        match state {
            VmState::Running | VmState::Paused if there && whole => {
                tokio::spawn(follow_live(run, self.live.clone()));
                let told = self.core.events.record(self.event(EventAction::Adopt, "")).await;
                self.log_failure("cannot keep an event", told.map_err(VmError::from));
            }
            VmState::Stopping if there => {
                let ended = self.end(Ending::Graceful(IN_PEACE), ExitReason::Stopped).await;
                self.log_failure("cannot go on with stopping a VM", ended);
            }
            // A start was under way and its steps are not known, or nothing is left: a clean end.
            _ => {
                let ended = self.end(Ending::Kill, ExitReason::Lost).await;
                self.log_failure("cannot end what is left of a VM", ended);
                self.after_a_run().await;
            }
        }
    }

    /// A run as the hooks find it again, and whether all of them did.
    async fn find_run(&mut self) -> (Arc<Run>, bool) {
        let vm = Arc::new(self.record.clone());
        let plan = empty_plan(self.record.id.clone());
        let run = Arc::new(Run::new(vm, self.paths.clone(), plan, self.output.clone()));
        let mut stages = self.begin("adopt");
        let mut whole = true;
        let core = Arc::clone(&self.core);
        // Never closed.
        let turn = core.looking.acquire().await;
        for capability in self.core.parts.capabilities.clone() {
            let name = format!("{}.adopt", capability.name());
            if let Err(error) = stages.stage(&name, capability.adopt(&run)).await {
                tracing::warn!(vm = %self.record.name, stage = name, causes = ?chain(&StageFailure(error)), "cannot find a running VM again");
                whole = false;
                break;
            }
        }
        drop(turn);
        // A VM that is found as it was has nothing to tell.
        if whole && run.machine().is_some() {
            stages.forget();
        }
        (run, whole)
    }

    /// The look that is due every minute: what others broke of a VM that runs, and what one that does not run still has.
    /// The loss of a process is noticed by its run at once.
    pub(super) async fn tend(&mut self) {
        if let Some(run) = self.run.clone() {
            return self.tend_running(&run).await;
        }
        if self.removed || self.record.life.state.has_vmm() {
            return;
        }
        if let Some(slot) = &self.slot {
            let waited = slot.taken.map_or(Duration::ZERO, |taken| taken.elapsed());
            if waited >= slots::PATIENCE {
                self.give_slot_back().await;
            }
            return;
        }
        if !self.paths.run().exists() {
            return;
        }
        let (run, _) = self.find_run().await;
        run.set_ending(Ending::Kill);
        let mut stages = self.begin("tend");
        let all = self.core.parts.capabilities.len();
        self.stop_all(&mut stages, &run, all).await;
        let event = self.event(
            EventAction::Repair,
            "ended and removed what was left of an earlier run",
        );
        let told = self.core.events.record(event).await;
        self.log_failure("cannot keep an event", told.map_err(VmError::from));
    }
}

impl Owner {
    async fn tend_running(&self, run: &Run) {
        for capability in self.core.parts.capabilities.clone() {
            let mended = match capability.tend(run).await {
                Ok(mended) => mended,
                Err(error) => {
                    let (capability, causes) = (capability.name(), chain(&StageFailure(error)));
                    tracing::warn!(vm = %self.record.name, capability, ?causes, "cannot look after a running VM");
                    continue;
                }
            };
            for line in mended {
                tracing::warn!(vm = %self.record.name, "{line}");
                let told = self
                    .core
                    .events
                    .record(self.event(EventAction::Repair, line))
                    .await;
                self.log_failure("cannot keep an event", told.map_err(VmError::from));
            }
        }
    }
}

/// Publishes VMM and agent of an adopted run as the agent comes back.
async fn follow_live(run: Arc<Run>, live: watch::Sender<Option<Live>>) {
    let mut agent = run.agent_slot().watch();
    loop {
        if run.over.is_cancelled() {
            return;
        }
        agent.mark_unchanged();
        live.send_replace(run.live());
        tokio::select! {
            () = run.over.cancelled() => return,
            changed = agent.changed() => if changed.is_err() { return },
        }
    }
}
