//! Starting: plan, record what will be made, make it, and undo it all when a stage fails.

use std::sync::Arc;

use offshoot_model::{Boot, ErrorKind, EventAction, ExitReason, ExitStatus, Explain, VmState};
use offshoot_store::db::VmWrite;
use offshoot_vmm::plan::Origin;
use tokio_util::sync::CancellationToken;

use super::{Owner, chain, now_ms};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::{BootNote, Life};
use crate::error::{StageFailure, VmError};
use crate::operation::Stages;
use crate::run::{Run, empty_plan};
use crate::slots::Slot;
use crate::templates::fit::Misfit;
use crate::templates::{Offer, Templates};

impl Owner {
    /// Boots the VM. Whatever goes wrong, nothing of it runs afterwards; a start that was cancelled leaves the VM as it
    /// was before.
    pub(super) async fn start(&mut self, cancel: &CancellationToken) -> Result<(), VmError> {
        // Kept when it is dropped, before whoever asked has the answer.
        let mut stages = self.begin("start");
        let allowed = self.core.preflight.refuse_the_doomed(&self.record.name);
        stages.stage("preflight", allowed).await?;
        let core = Arc::clone(&self.core);
        let _starting = core
            .parts
            .templates
            .as_ref()
            .map(|templates| templates.starting());
        let before = self.record.life.clone();
        let begun = Life {
            state: VmState::Starting,
            started_ms: Some(now_ms()),
            ..Life::new()
        };
        let plan = match stages.stage("plan", async { self.plan() }).await {
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
        stages.stage("row", self.save_with(begun, write)).await?;
        match self.boot_as_offered(plan, &mut stages, cancel).await {
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
        }
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
        let event = self.event(EventAction::Start, "");
        if let Err(error) = stages.stage("row.running", self.save(life, Some(event))).await {
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

    /// Restores the VM where there is a template for it, and boots it where there is none or that fails.
    async fn boot_as_offered(
        &mut self,
        mut plan: VmPlan,
        stages: &mut Stages,
        cancel: &CancellationToken,
    ) -> Result<Arc<Run>, (VmError, Vec<String>)> {
        let Some(templates) = self.core.parts.templates.clone() else {
            return self.boot(plan, stages, cancel).await;
        };
        if let Some(slot) = self.slot.take() {
            match self.boot_warm(&templates, slot, plan, stages, cancel).await {
                Ok(run) => return Ok(run),
                Err((error @ VmError::Cancelled { .. }, causes)) => return Err((error, causes)),
                Err((error, _)) => {
                    let causes = chain(&error);
                    tracing::warn!(vm = %self.record.name, ?causes, "a warm slot is of no use");
                    plan = self.plan().map_err(|error| (error, Vec::new()))?;
                }
            }
        }
        let offer = self.offer(&templates, &plan, stages, cancel).await;
        let offer = offer.map_err(|error| (error, Vec::new()))?;
        let (reason, wanted) = match offer {
            Offer::Cold { reason, wanted, .. } => (reason, wanted),
            Offer::Template { loaded, saved } => {
                self.record.life.boot = Some(BootNote::template(&loaded.id));
                plan.launch.origin = Origin::Template(saved);
                match self.boot(plan, stages, cancel).await {
                    Ok(run) => {
                        templates.worked(&loaded.id);
                        return Ok(run);
                    }
                    Err((error, causes)) => {
                        if self.record.definition.config.boot == Boot::Template || !is_the_templates(&error) {
                            return Err((error, causes));
                        }
                        let reason = format!("template {} failed: {}", loaded.id, chain(&error).join(": "));
                        tracing::warn!(vm = %self.record.name, reason, "booting the kernel instead");
                        templates.failed(&loaded.id).await;
                        stages.recovered();
                        plan = self.plan().map_err(|error| (error, Vec::new()))?;
                        let wanted = templates.key(&self.record, &plan.launch).await.ok().map(Box::new);
                        (reason, wanted)
                    }
                }
            }
        };
        self.record.life.boot = Some(BootNote::cold(&reason));
        let run = self.boot(plan, stages, cancel).await?;
        if let Some(key) = wanted {
            templates.make_later(&self.core, &run.vm, *key);
        }
        Ok(run)
    }

    /// Takes over a warm slot. Whatever goes wrong, nothing of the slot is left.
    async fn boot_warm(
        &mut self,
        templates: &Templates,
        slot: Box<Slot>,
        mut plan: VmPlan,
        stages: &mut Stages,
        cancel: &CancellationToken,
    ) -> Result<Arc<Run>, (VmError, Vec<String>)> {
        let key = templates.key(&self.record, &plan.launch).await;
        if key.as_ref() != Ok(&slot.key) {
            slot.end(&self.core).await;
            let reason = key
                .err()
                .unwrap_or_else(|| "the host has changed since it was made".into());
            let stage = "slot.take".to_owned();
            return Err((
                self.stage_error("start", stage, Box::new(Stale { reason })),
                Vec::new(),
            ));
        }
        self.record.life.boot = Some(BootNote::slot(&slot.template));
        plan.launch.origin = Origin::Template(slot.saved.clone());
        slot.hand_over();
        let vm = Arc::new(self.record.clone());
        let warm = slot.warm.clone();
        let run = Run::of_slot(vm, self.paths.clone(), plan, self.output.clone(), warm);
        self.boot_run(Arc::new(run), stages, cancel).await
    }

    /// What it is restored from. One that was asked for by name is made first where there is none, or refused.
    async fn offer(
        &self,
        templates: &Arc<Templates>,
        plan: &VmPlan,
        stages: &mut Stages,
        cancel: &CancellationToken,
    ) -> Result<Offer, VmError> {
        let look = async { Ok::<_, VmError>(templates.offer(&self.record, &plan.launch).await) };
        let offer = stages.stage("template.look", look).await?;
        if self.record.definition.config.boot != Boot::Template {
            return Ok(offer);
        }
        let Offer::Cold {
            reason,
            wanted,
            misfit,
        } = offer
        else {
            return Ok(offer);
        };
        let refused = |reason: String, hint: &str| VmError::NoTemplate {
            name: self.record.name.clone(),
            reason,
            hint: hint.into(),
        };
        let hint = misfit.map_or("boot its kernel with `--boot auto`", Misfit::remedy);
        let Some(key) = wanted else {
            return Err(refused(reason, hint));
        };
        // A task of its own: one that was begun is brought to its end, whoever waits for it.
        let making = tokio::spawn({
            let (templates, core) = (Arc::clone(templates), Arc::clone(&self.core));
            let vm = self.record.clone();
            async move { templates.make(&core, &vm, &key).await }
        });
        let make = async {
            tokio::select! {
                () = cancel.cancelled() => Err(VmError::Cancelled {
                    name: self.record.name.clone(),
                    operation: "start",
                }),
                made = making => {
                    let made = made.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
                    made.map_err(|error| self.stage_error("start", "template.make".into(), Box::new(error)))
                }
            }
        };
        stages.stage("template.make", make).await?;
        match templates.offer(&self.record, &plan.launch).await {
            Offer::Cold { reason, .. } => Err(refused(reason, hint)),
            offer @ Offer::Template { .. } => Ok(offer),
        }
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
        let vm = Arc::new(self.record.clone());
        let run = Arc::new(Run::new(vm, self.paths.clone(), plan, self.output.clone()));
        self.boot_run(run, stages, cancel).await
    }

    async fn boot_run(
        &mut self,
        run: Arc<Run>,
        stages: &mut Stages,
        cancel: &CancellationToken,
    ) -> Result<Arc<Run>, (VmError, Vec<String>)> {
        let capabilities = self.core.parts.capabilities.clone();
        // What a slot has is all capabilities' to undo, whoever fails.
        let all = capabilities.len();
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
                    stages.stage("row.machine", self.save(life, None)).await?;
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
                self.stop_all(stages, &run, if run.is_warm() { all } else { begun })
                    .await;
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

/// The slot that a VM took is not what the VM is any more.
#[derive(Debug, thiserror::Error)]
#[error("the warm slot cannot be used: {reason}")]
struct Stale {
    reason: String,
}

impl Explain for Stale {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Whether a start that restored a template failed where another boot would do better: in the VMM, or in the guest's first
/// steps.
fn is_the_templates(error: &VmError) -> bool {
    match error {
        VmError::Stage { stage, .. } => {
            let capability = stage.split('.').next().unwrap_or_default();
            matches!(capability, "vmm" | "agent")
        }
        _ => false,
    }
}
