//! Starting: plan, record what will be made, make it, and undo it all when a stage fails.

use std::sync::Arc;

use offshoot_model::{EventAction, ExitReason, ExitStatus, Explain as _, VmState};
use offshoot_store::db::VmWrite;
use tokio_util::sync::CancellationToken;

use super::{Owner, chain, now_ms};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::Life;
use crate::error::{StageFailure, VmError};
use crate::operation::Stages;
use crate::run::{Run, empty_plan};

impl Owner {
    /// Boots the VM. Whatever goes wrong, nothing of it runs afterwards; a start that was cancelled leaves the VM as it
    /// was before.
    pub(super) async fn start(&mut self, cancel: &CancellationToken) -> Result<(), VmError> {
        self.core.preflight.refuse_the_doomed(&self.record.name).await?;
        let before = self.record.life.clone();
        let begun = Life {
            state: VmState::Starting,
            started_ms: Some(now_ms()),
            ..Life::new()
        };
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(error) => {
                self.record.life = begun;
                return Err(self.failed(error, Vec::new()).await);
            }
        };
        // Everything that the plan names is known of before any of it is made.
        let write = VmWrite {
            objects: Some(plan.objects.clone()),
            ..VmWrite::default()
        };
        self.save_with(begun, write).await?;
        let mut stages = Stages::begin("start");
        let outcome = match self.boot(plan, &mut stages, cancel).await {
            Ok(run) => self.ready(run, &mut stages).await,
            Err((error @ VmError::Cancelled { .. }, _)) => {
                let write = VmWrite {
                    events: vec![self.event(EventAction::StartFailed, "it was cancelled")],
                    objects: Some(Vec::new()),
                };
                self.save_surely(before, write).await?;
                Err(error)
            }
            Err((error, causes)) => Err(self.failed(error, causes).await),
        };
        self.keep(stages).await;
        outcome
    }

    fn plan(&self) -> Result<VmPlan, VmError> {
        let mut plan = empty_plan(self.record.id.clone());
        for capability in &self.core.parts.capabilities {
            capability
                .plan(&self.record, &self.paths, &mut plan)
                .map_err(|error| self.stage_error("start", format!("{}.plan", capability.name()), error))?;
        }
        Ok(plan)
    }

    /// The VM runs. When that cannot be written, it is not so: a daemon that comes after this one would not know.
    async fn ready(&mut self, run: Arc<Run>, stages: &mut Stages) -> Result<(), VmError> {
        let life = Life {
            state: VmState::Running,
            ..self.record.life.clone()
        };
        if let Err(error) = self.save(life, Some(self.event(EventAction::Start, ""))).await {
            stages.undone();
            let all = self.core.parts.capabilities.len();
            self.stop_all(stages, &run, all).await;
            return Err(self.failed(error, Vec::new()).await);
        }
        self.live.send_replace(run.live());
        self.run = Some(run);
        self.running_since = Some(std::time::Instant::now());
        Ok(())
    }

    /// Records why a start failed, with what was noted while it was undone, and adds what the checks of the host say about
    /// it.
    async fn failed(&mut self, mut error: VmError, causes: Vec<String>) -> VmError {
        if let VmError::Stage { stage, findings, .. } = &mut error {
            let capability = stage.split('.').next().unwrap_or_default().to_owned();
            *findings = self.core.preflight.explain(&capability).await;
        }
        let mut failure = chain(&error);
        failure.extend(causes);
        let life = Life {
            state: VmState::Failed,
            machine: None,
            finished_ms: Some(now_ms()),
            exit: error.exit_status().map(|code| ExitStatus {
                code,
                reason: ExitReason::MainExited,
            }),
            failure: failure.clone(),
            ..self.record.life.clone()
        };
        let write = VmWrite {
            events: vec![self.event(EventAction::StartFailed, failure.join(": "))],
            objects: Some(Vec::new()),
        };
        let saved = self.save_surely(life, write).await;
        self.log_failure("cannot write that a start failed", saved);
        error
    }

    /// Runs every hook that a start needs, undoing them when one fails. An error comes with what was noted of its causes.
    async fn boot(
        &mut self,
        plan: VmPlan,
        stages: &mut Stages,
        cancel: &CancellationToken,
    ) -> Result<Arc<Run>, (VmError, Vec<String>)> {
        let capabilities = self.core.parts.capabilities.clone();
        let vm = Arc::new(self.record.clone());
        let run = Arc::new(Run::new(vm, self.paths.clone(), plan, self.output.clone()));

        let mut begun = 0;
        let result = async {
            for capability in &capabilities {
                begun += 1;
                self.hook(stages, cancel, &**capability, "prepare", capability.prepare(&run))
                    .await?;
                let machine = run.machine().map(|machine| machine.state().clone());
                if machine != self.record.life.machine {
                    let life = Life {
                        machine,
                        ..self.record.life.clone()
                    };
                    self.save(life, None).await?;
                }
            }
            for capability in &capabilities {
                self.hook(
                    stages,
                    cancel,
                    &**capability,
                    "after_boot",
                    capability.after_boot(&run),
                )
                .await?;
            }
            let steps = run
                .guest_stages()
                .into_iter()
                .map(|(name, time)| (format!("guest.{name}"), time));
            stages.note_within("agent.after_boot", steps.collect());
            Ok(())
        }
        .await;
        match result {
            Ok(()) => Ok(run),
            Err(error) => {
                stages.undone();
                self.stop_all(stages, &run, begun).await;
                Err((error, run.causes()))
            }
        }
    }

    async fn hook(
        &self,
        stages: &mut Stages,
        cancel: &CancellationToken,
        capability: &dyn Capability,
        hook: &str,
        work: impl Future<Output = Result<(), CapabilityError>>,
    ) -> Result<(), VmError> {
        let name = format!("{}.{hook}", capability.name());
        let operation = stages.operation();
        let work = async {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    Err(VmError::Cancelled { name: self.record.name.clone(), operation })
                }
                result = work => result.map_err(|error| self.stage_error(operation, name.clone(), error)),
            }
        };
        stages.stage(&name, work).await
    }

    /// Calls the `stop` of the first `begun` capabilities, backwards. A hook that fails does not keep the others from
    /// their turn.
    pub(super) async fn stop_all(&self, stages: &mut Stages, run: &Arc<Run>, begun: usize) {
        for capability in self.core.parts.capabilities[..begun].iter().rev() {
            let name = format!("{}.stop", capability.name());
            if let Err(error) = stages.stage(&name, capability.stop(run)).await {
                let causes = chain(&StageFailure(error));
                tracing::warn!(vm = %self.record.name, stage = name, ?causes, "while stopping");
            }
        }
        run.over.cancel();
    }
}
