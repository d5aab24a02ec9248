//! Stopping, resetting and removing.

use std::sync::Arc;

use offshoot_agent_proto::client::SessionCount;
use offshoot_model::{EventAction, ExitReason, ExitStatus, VmState};
use offshoot_store::db::VmWrite;

use super::{Owner, now_ms, remove_tree};
use crate::definition::Life;
use crate::error::VmError;
use crate::exit::exit_status;
use crate::measure;
use crate::operation::Stages;
use crate::run::{Ending, Run};

impl Owner {
    /// Brings the current run to its end and records how it ended; nothing when there is none.
    pub(super) async fn end(&mut self, ending: Ending, reason: ExitReason) -> Result<(), VmError> {
        self.restart_at = None;
        let Some(run) = self.run.take() else { return Ok(()) };
        let main_exit_before = run.main_exit();
        let asked = matches!(reason, ExitReason::Stopped | ExitReason::Killed);
        let auto_remove = self.record.definition.config.auto_remove && ending != Ending::Kill;
        let ending = if auto_remove && main_exit_before.is_some() {
            Ending::Discard
        } else {
            ending
        };
        self.ran_for = self.running_since.take().map(|since| since.elapsed());
        if let (Some(ran_for), Some(_)) = (self.ran_for, main_exit_before) {
            self.begin("run").note_ended("guest.main", ran_for);
        }
        let mut stages = self.begin("stop");
        self.resume_for(&mut stages, ending, &run).await;
        if ending != Ending::Discard {
            let life = Life {
                state: VmState::Stopping,
                held: asked || self.record.life.held,
                ..self.record.life.clone()
            };
            let event = asked.then(|| self.event(EventAction::Stop, ""));
            // A database that cannot be written to does not keep a machine running that is to end.
            let saved = stages.stage("row", self.save(life, event)).await;
            self.log_failure("cannot write that a VM is stopping", saved);
        }
        self.live.send_replace(None);
        run.set_ending(ending);
        let gone = (reason == ExitReason::VmmDied).then(|| run.gone());
        let all = self.core.parts.capabilities.len();
        self.stop_all(&mut stages, &run, all).await;
        let exit = exit_status(reason, main_exit_before, run.main_exit(), gone);
        measure::exit(exit.reason);
        let causes = run.causes();
        let life = Life {
            state: VmState::Stopped,
            machine: None,
            finished_ms: Some(now_ms()),
            exit: Some(exit),
            failure: causes.clone(),
            held: asked || self.record.life.held,
            degraded: Vec::new(),
            sessions: SessionCount::default(),
            ..self.record.life.clone()
        };
        let write = VmWrite {
            events: vec![self.event(EventAction::Exit, told(exit, &causes))],
            objects: Some(Vec::new()),
        };
        stages.stage("row.stopped", self.save_surely(life, write)).await
    }

    /// A guest whose vCPUs stand still cannot put its house in order.
    async fn resume_for(&self, stages: &mut Stages, ending: Ending, run: &Arc<Run>) {
        if self.record.life.state != VmState::Paused || !matches!(ending, Ending::Graceful(_)) {
            return;
        }
        if let Some(machine) = run.machine()
            && let Err(error) = stages.stage("vmm.resume", machine.resume()).await
        {
            tracing::warn!(%error, "cannot resume a paused VM to stop it; it is killed in the end");
        }
    }

    /// Drops what the VM wrote but its work. Nothing of it runs.
    pub(super) async fn reset(&mut self) -> Result<(), VmError> {
        let mut stages = self.begin("reset");
        for capability in self.core.parts.capabilities.clone() {
            let name = format!("{}.reset", capability.name());
            stages
                .stage(&name, capability.reset(&self.record, &self.paths))
                .await
                .map_err(|error| self.stage_error("reset", name.clone(), error))?;
        }
        let event = self.event(EventAction::Reset, "");
        stages.stage("event", self.core.events.record(event)).await?;
        Ok(())
    }

    /// Writes that the VM is to go, before anything of it does: a daemon that comes after this one finishes it.
    pub(super) async fn announce_removal(&mut self) -> Result<(), VmError> {
        let life = Life {
            removing: true,
            ..self.record.life.clone()
        };
        self.save(life, None).await
    }

    /// Deletes the VM, of which nothing runs. Its row goes first: from then on it is gone, and what a crash leaves is
    /// swept at the next start.
    pub(super) async fn remove(&mut self) -> Result<(), VmError> {
        let mut stages = self.begin("remove");
        for capability in self.core.parts.capabilities.clone().iter().rev() {
            let name = format!("{}.clean_up", capability.name());
            stages
                .stage(&name, capability.clean_up(&self.record, &self.paths))
                .await
                .map_err(|error| self.stage_error("remove", name.clone(), error))?;
        }
        let (id, db) = (self.record.id.clone(), self.core.parts.db.clone());
        let event = self.event(EventAction::Remove, "");
        let events = stages
            .stage("row", db.call(move |db| db.remove_vm(&id, &[event])))
            .await?;
        self.removed = true;
        let paths = self.paths.clone();
        let swept = stages
            .stage("files", async {
                let swept = tokio::task::spawn_blocking(move || {
                    remove_tree(paths.run()).and_then(|()| remove_tree(paths.data()))
                });
                swept
                    .await
                    .unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
            })
            .await;
        if let Err(error) = swept {
            tracing::warn!(vm = %self.record.name, %error, "cannot delete the files of a removed VM; the next look for leftovers will");
        }
        // Last: whoever finds no such VM any more finds nothing of it.
        self.registry.forget(&self.record.id);
        self.core.events.announce(&events);
        Ok(())
    }
}

/// How a run ended, for the history.
fn told(exit: ExitStatus, causes: &[String]) -> String {
    let how = match exit.reason {
        ExitReason::MainExited => "its main process ended",
        ExitReason::Stopped => "it was stopped",
        ExitReason::Killed => "it was killed",
        ExitReason::GuestPoweredOff => "the guest switched itself off",
        ExitReason::GuestPanicked => "the guest's kernel panicked",
        ExitReason::VmmDied => "its VMM died",
        ExitReason::Lost => "it was gone when the daemon looked for it",
    };
    let mut text = format!("{how}, status {}", exit.code);
    for cause in causes {
        text.push_str("; ");
        text.push_str(cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_says_how_and_why() {
        let exit = ExitStatus {
            code: 255,
            reason: ExitReason::VmmDied,
        };
        assert_eq!(
            told(exit, &["out of memory".into()]),
            "its VMM died, status 255; out of memory"
        );
    }
}
