//! The task that owns one VM: the only place where its life changes.
//!
//! Requests come through a mailbox and are handled one after another. A request that ends the VM cuts a start short
//! that is under way: the start undoes itself, then the request is handled. A client that goes away changes nothing:
//! what was begun is brought to its end here. The row in the database is written before a new state is announced.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use offshoot_model::{ExitReason, ExitStatus, Explain as _, RestartPolicy, VmName, VmState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::capability::Capability;
use crate::definition::{Life, VmRecord};
use crate::engine::{Parts, Registry};
use crate::error::{StageFailure, VmError};
use crate::exit::exit_status;
use crate::operation::Stages;
use crate::output::OutputLog;
use crate::paths::VmPaths;
use crate::request::{RequestKind, Verdict, decide};
use crate::run::{Ending, Live, Run, empty_plan};

/// How long a guest gets to put its house in order after its main process ended by itself.
const AFTER_MAIN: Duration = Duration::from_secs(2);
/// How long a guest gets when it is stopped to be reset: what it keeps shall be whole.
const BEFORE_RESET: Duration = Duration::from_secs(10);
/// The first pause before a VM with a restart policy is started again; doubled each time, as Docker does it.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A run this long was no crash loop: the next pause is the first one again.
const RESTART_RESET: Duration = Duration::from_secs(10);

/// One request with all it needs.
#[derive(Clone, Debug)]
pub enum Request {
    /// Boot it.
    Start,
    /// Ask its guest to end; kill it after this long.
    Stop(Duration),
    /// End it at once.
    Kill,
    /// Send a Linux signal number to its main process.
    Signal(u32),
    /// Halt its vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Drop what it wrote but its work; with `true` also when it runs: it is stopped first.
    Reset(bool),
    /// Delete it; with `true` also when it runs.
    Remove(bool),
    /// Give it another name.
    Rename(VmName),
}

impl Request {
    fn kind(&self) -> RequestKind {
        match self {
            Self::Start => RequestKind::Start,
            Self::Stop(_) => RequestKind::Stop,
            Self::Kill => RequestKind::Kill,
            Self::Signal(_) => RequestKind::Signal,
            Self::Pause => RequestKind::Pause,
            Self::Resume => RequestKind::Resume,
            Self::Reset(false) => RequestKind::Reset,
            Self::Reset(true) => RequestKind::ResetForced,
            Self::Remove(false) => RequestKind::Remove,
            Self::Remove(true) => RequestKind::RemoveForced,
            Self::Rename(_) => RequestKind::Rename,
        }
    }
}

/// A request and whom to answer.
pub(crate) struct Letter {
    pub(crate) request: Request,
    pub(crate) reply: oneshot::Sender<Result<Arc<VmRecord>, VmError>>,
}

/// What others see of a VM, and how they reach its owner.
#[derive(Clone)]
pub struct VmHandle {
    pub(crate) mailbox: mpsc::Sender<Letter>,
    /// The record as it is now. Closed when the VM is removed; the last value stays readable.
    pub view: watch::Receiver<Arc<VmRecord>>,
    /// VMM and agent, while both are there.
    pub live: watch::Receiver<Option<Live>>,
    /// What its main process wrote.
    pub output: OutputLog,
    /// Where its files lie.
    pub paths: VmPaths,
}

impl VmHandle {
    /// Asks the owner and waits for the answer. Dropping the future does not stop what was asked.
    pub async fn ask(&self, request: Request) -> Result<Arc<VmRecord>, VmError> {
        let (reply, answer) = oneshot::channel();
        let removed = || VmError::Removed {
            name: self.view.borrow().name.clone(),
        };
        self.mailbox
            .send(Letter { request, reply })
            .await
            .map_err(|_| removed())?;
        answer.await.map_err(|_| removed())?
    }
}

/// What happens to a run by itself.
enum Event {
    MainExited,
    VmmExited,
    RestartDue,
    Degraded(Vec<String>),
}

pub(crate) struct Owner {
    parts: Arc<Parts>,
    registry: Arc<Registry>,
    record: VmRecord,
    paths: VmPaths,
    output: OutputLog,
    view: watch::Sender<Arc<VmRecord>>,
    live: watch::Sender<Option<Live>>,
    run: Option<Arc<Run>>,
    /// When the current run became ready, if this daemon started it.
    running_since: Option<std::time::Instant>,
    /// How often in a row it was started again, and when that is due next.
    restarts: u32,
    restart_at: Option<tokio::time::Instant>,
    removed: bool,
}

impl Owner {
    /// Starts the task for a VM whose row is written. `adopt`: look for what a daemon before this one left running.
    pub(crate) fn spawn(
        parts: Arc<Parts>,
        registry: Arc<Registry>,
        record: VmRecord,
        output: OutputLog,
        adopt: bool,
    ) -> VmHandle {
        let paths = parts.paths(&record.id);
        let (mailbox, letters) = mpsc::channel(64);
        let view = watch::Sender::new(Arc::new(record.clone()));
        let live = watch::Sender::new(None);
        let handle = VmHandle {
            mailbox,
            view: view.subscribe(),
            live: live.subscribe(),
            output: output.clone(),
            paths: paths.clone(),
        };
        let owner = Self {
            parts,
            registry,
            record,
            paths,
            output,
            view,
            live,
            run: None,
            running_since: None,
            restarts: 0,
            restart_at: None,
            removed: false,
        };
        tokio::spawn(owner.live_on(letters, adopt));
        handle
    }

    async fn live_on(mut self, mut letters: mpsc::Receiver<Letter>, adopt: bool) {
        if adopt {
            self.adopt().await;
        }
        let mut waiting = VecDeque::new();
        while !self.removed {
            let letter = match waiting.pop_front() {
                Some(letter) => letter,
                None => tokio::select! {
                    letter = letters.recv() => match letter {
                        Some(letter) => letter,
                        // Every handle is gone: the daemon is shutting down, and the VM runs on.
                        None => return,
                    },
                    event = next_event(self.run.clone(), self.restart_at, &self.record.life.degraded) => {
                        self.handle_event(event, &mut letters, &mut waiting).await;
                        continue;
                    }
                },
            };
            let answer = self.handle(letter.request, &mut letters, &mut waiting).await;
            // Whoever asked may have gone; the answer is in the database too.
            let _ = letter.reply.send(answer.map(|()| Arc::new(self.record.clone())));
        }
        for letter in waiting {
            let _ = letter.reply.send(Err(VmError::Removed {
                name: self.record.name.clone(),
            }));
        }
    }

    async fn handle(
        &mut self,
        request: Request,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) -> Result<(), VmError> {
        let kind = request.kind();
        match decide(self.record.life.state, kind) {
            Verdict::Do => {}
            Verdict::AlreadySo => {
                if kind == RequestKind::Stop {
                    self.restart_at = None;
                }
                return Ok(());
            }
            Verdict::Refuse(hint) => {
                return Err(VmError::WrongState {
                    name: self.record.name.clone(),
                    state: self.record.life.state.as_str(),
                    request: kind,
                    hint: hint
                        .replace("{0}", self.record.name.as_str())
                        .replace("{}", self.record.name.as_str()),
                });
            }
        }
        match request {
            Request::Start => {
                self.restarts = 0;
                let started = self.start_interruptibly(letters, waiting).await;
                if started.is_err() && self.record.definition.config.auto_remove {
                    self.remove().await?;
                }
                started
            }
            Request::Stop(grace) => self.end(Ending::Graceful(grace), ExitReason::Stopped).await,
            Request::Kill => self.end(Ending::Kill, ExitReason::Killed).await,
            Request::Signal(signal) => self.signal(signal).await,
            Request::Pause => self.set_paused(true).await,
            Request::Resume => self.set_paused(false).await,
            Request::Reset(_) => {
                self.restart_at = None;
                self.end(Ending::Graceful(BEFORE_RESET), ExitReason::Stopped)
                    .await?;
                self.reset().await
            }
            Request::Remove(_) => {
                self.restart_at = None;
                if self.run.is_some() {
                    self.end(Ending::Discard, ExitReason::Killed).await?;
                }
                self.remove().await
            }
            Request::Rename(name) => {
                let id = self.record.id.clone();
                let new = name.clone();
                self.parts.db.call(move |db| db.rename_vm(&id, &new)).await?;
                self.record.name = name;
                self.announce();
                Ok(())
            }
        }
    }

    async fn handle_event(
        &mut self,
        event: Event,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) {
        let result = match event {
            Event::Degraded(messages) => {
                tracing::warn!(vm = %self.record.name, ?messages, "a VM works only in part");
                self.record.life.degraded = messages;
                self.announce();
                return;
            }
            Event::MainExited => {
                self.end(Ending::Graceful(AFTER_MAIN), ExitReason::MainExited)
                    .await
            }
            Event::VmmExited => self.end(Ending::Kill, ExitReason::VmmDied).await,
            Event::RestartDue => {
                self.restart_at = None;
                self.start_interruptibly(letters, waiting).await
            }
        };
        if let Err(error) = result {
            tracing::warn!(vm = %self.record.name, %error, "after an event of the VM's own");
        }
        if self.run.is_some() || self.removed {
            return;
        }
        if self.record.definition.config.auto_remove {
            if let Err(error) = self.remove().await {
                tracing::warn!(vm = %self.record.name, %error, "cannot remove a VM that was started with --rm");
            }
        } else {
            self.plan_restart();
        }
    }

    /// Decides whether and when a VM that ended by itself is started again.
    fn plan_restart(&mut self) {
        let life = &self.record.life;
        let failed = life.state == VmState::Failed || life.exit.is_some_and(|exit| exit.code != 0);
        let wanted = match self.record.definition.config.restart {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure => failed,
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
        };
        if !wanted {
            return;
        }
        if let (Some(began), Some(ended)) = (life.started_ms, life.finished_ms)
            && Duration::from_millis(ended.saturating_sub(began)) >= RESTART_RESET
        {
            self.restarts = 0;
        }
        let pause = (RESTART_PAUSE * 2u32.saturating_pow(self.restarts.min(16))).min(RESTART_PAUSE_MAX);
        self.restarts += 1;
        self.restart_at = Some(tokio::time::Instant::now() + pause);
    }

    /// Starts the VM while reading the mailbox: a request that ends it cancels the start; all are handled after it.
    async fn start_interruptibly(
        &mut self,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) -> Result<(), VmError> {
        let cancel = CancellationToken::new();
        let mut start = pin!(self.start(&cancel));
        loop {
            tokio::select! {
                result = &mut start => return result,
                Some(letter) = letters.recv() => {
                    if letter.request.kind().interrupts_start() {
                        cancel.cancel();
                    }
                    waiting.push_back(letter);
                }
            }
        }
    }

    async fn start(&mut self, cancel: &CancellationToken) -> Result<(), VmError> {
        self.save(Life {
            state: VmState::Starting,
            started_ms: Some(now_ms()),
            ..Life::new()
        })
        .await?;
        let mut stages = Stages::begin("start");
        let result = self.boot(&mut stages, cancel).await;
        let outcome = match result {
            Ok(run) => {
                self.live.send_replace(run.live());
                self.run = Some(run);
                self.running_since = Some(std::time::Instant::now());
                let life = Life {
                    state: VmState::Running,
                    ..self.record.life.clone()
                };
                self.save(life).await
            }
            Err(error) => {
                let life = Life {
                    state: VmState::Failed,
                    machine: None,
                    finished_ms: Some(now_ms()),
                    exit: error.exit_status().map(|code| ExitStatus {
                        code,
                        reason: ExitReason::MainExited,
                    }),
                    failure: chain(&error),
                    ..self.record.life.clone()
                };
                self.save(life).await?;
                Err(error)
            }
        };
        self.keep(stages).await;
        outcome
    }

    /// Runs every hook that a start needs, undoing them when one fails.
    async fn boot(&mut self, stages: &mut Stages, cancel: &CancellationToken) -> Result<Arc<Run>, VmError> {
        let capabilities = self.parts.capabilities.clone();
        let mut plan = empty_plan(self.record.id.clone());
        for capability in &capabilities {
            capability
                .plan(&self.record, &self.paths, &mut plan)
                .map_err(|error| self.stage_error("start", format!("{}.plan", capability.name()), error))?;
        }
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
                    self.save(Life {
                        machine,
                        ..self.record.life.clone()
                    })
                    .await?;
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
                Err(error)
            }
        }
    }

    async fn hook(
        &self,
        stages: &mut Stages,
        cancel: &CancellationToken,
        capability: &dyn Capability,
        hook: &str,
        work: impl Future<Output = Result<(), crate::capability::CapabilityError>>,
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

    fn stage_error(
        &self,
        operation: &'static str,
        stage: String,
        error: crate::capability::CapabilityError,
    ) -> VmError {
        VmError::Stage {
            name: self.record.name.clone(),
            operation,
            stage,
            source: StageFailure(error),
        }
    }

    /// Calls the `stop` of the first `begun` capabilities, backwards. A hook that fails does not keep the others from
    /// their turn.
    async fn stop_all(&self, stages: &mut Stages, run: &Arc<Run>, begun: usize) {
        for capability in self.parts.capabilities[..begun].iter().rev() {
            let name = format!("{}.stop", capability.name());
            if let Err(error) = stages.stage(&name, capability.stop(run)).await {
                let causes = chain(&StageFailure(error));
                tracing::warn!(vm = %self.record.name, stage = name, ?causes, "while stopping");
            }
        }
        run.over.cancel();
    }

    /// Brings the current run to its end and records how it ended.
    async fn end(&mut self, ending: Ending, reason: ExitReason) -> Result<(), VmError> {
        self.restart_at = None;
        let Some(run) = self.run.take() else { return Ok(()) };
        let main_exit_before = run.main_exit();
        let auto_remove = self.record.definition.config.auto_remove && ending != Ending::Kill;
        let ending = if auto_remove && main_exit_before.is_some() {
            Ending::Discard
        } else {
            ending
        };
        if ending != Ending::Discard {
            self.save(Life {
                state: VmState::Stopping,
                ..self.record.life.clone()
            })
            .await?;
        }
        self.live.send_replace(None);
        run.set_ending(ending);
        let mut stages = Stages::begin("stop");
        if let (Some(since), Some(_)) = (self.running_since.take(), main_exit_before) {
            stages.note("guest.main", 0, since.elapsed());
        }
        let vmm_died = reason == ExitReason::VmmDied;
        self.stop_all(&mut stages, &run, self.parts.capabilities.len())
            .await;
        let exit = exit_status(
            reason,
            main_exit_before,
            run.main_exit(),
            vmm_died.then(|| run.powered_off()),
        );
        let life = Life {
            state: VmState::Stopped,
            machine: None,
            finished_ms: Some(now_ms()),
            exit: Some(exit),
            degraded: Vec::new(),
            ..self.record.life.clone()
        };
        self.save(life).await?;
        self.keep(stages).await;
        Ok(())
    }

    async fn signal(&mut self, signal: u32) -> Result<(), VmError> {
        let name = self.record.name.clone();
        let agent = self.run.as_ref().and_then(|run| run.agent());
        let agent = agent.ok_or(VmError::NoAgent {
            name: name.clone(),
            operation: "signal",
        })?;
        agent.signal_main(signal).await.map_err(|error| VmError::Machine {
            name,
            operation: "signal",
            source: StageFailure(Box::new(error)),
        })
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), VmError> {
        let operation = if paused { "pause" } else { "resume" };
        let Some(machine) = self.run.as_ref().and_then(|run| run.machine()) else {
            return Ok(());
        };
        let result = if paused {
            machine.pause().await
        } else {
            machine.resume().await
        };
        result.map_err(|error| VmError::Machine {
            name: self.record.name.clone(),
            operation,
            source: StageFailure(Box::new(error)),
        })?;
        let state = if paused { VmState::Paused } else { VmState::Running };
        self.save(Life {
            state,
            ..self.record.life.clone()
        })
        .await
    }

    /// Drops what the VM wrote but its work. Nothing of it runs.
    async fn reset(&mut self) -> Result<(), VmError> {
        let mut stages = Stages::begin("reset");
        for capability in self.parts.capabilities.clone() {
            let name = format!("{}.reset", capability.name());
            stages
                .stage(&name, capability.reset(&self.record, &self.paths))
                .await
                .map_err(|error| self.stage_error("reset", name.clone(), error))?;
        }
        self.keep(stages).await;
        Ok(())
    }

    /// Deletes the VM. Its row goes first: from then on it is gone, and what a crash leaves is swept at the next start.
    async fn remove(&mut self) -> Result<(), VmError> {
        for capability in self.parts.capabilities.iter().rev() {
            capability
                .clean_up(&self.record, &self.paths)
                .await
                .map_err(|error| {
                    self.stage_error("remove", format!("{}.clean_up", capability.name()), error)
                })?;
        }
        let id = self.record.id.clone();
        self.parts.db.call(move |db| db.remove_vm(&id)).await?;
        self.removed = true;
        let paths = self.paths.clone();
        let swept = tokio::task::spawn_blocking(move || {
            remove_tree(paths.run()).and_then(|()| remove_tree(paths.data()))
        });
        if let Ok(Err(error)) = swept.await {
            tracing::warn!(vm = %self.record.name, %error, "cannot delete the files of a removed VM; the next start of the daemon will");
        }
        // Last: whoever finds no such VM any more finds nothing of it.
        self.registry.forget(&self.record.id);
        Ok(())
    }

    /// Finds out what became of a VM whose row says that it ran.
    async fn adopt(&mut self) {
        let state = self.record.life.state;
        if !state.has_vmm() {
            if state != VmState::Created
                && matches!(self.record.definition.config.restart, RestartPolicy::Always)
            {
                self.restart_at = Some(tokio::time::Instant::now());
            }
            return;
        }
        let vm = Arc::new(self.record.clone());
        let plan = empty_plan(self.record.id.clone());
        let run = Arc::new(Run::new(vm, self.paths.clone(), plan, self.output.clone()));
        let mut stages = Stages::begin("adopt");
        let mut found = true;
        for capability in self.parts.capabilities.clone() {
            let name = format!("{}.adopt", capability.name());
            if let Err(error) = stages.stage(&name, capability.adopt(&run)).await {
                tracing::warn!(vm = %self.record.name, stage = name, causes = ?chain(&StageFailure(error)), "cannot find a running VM again");
                found = false;
                break;
            }
        }
        self.keep(stages).await;
        if run.machine().is_none() {
            self.run = Some(run);
            let result = self.end(Ending::Kill, ExitReason::Lost).await;
            self.log_failure(result);
            if self.record.definition.config.auto_remove {
                let result = self.remove().await;
                self.log_failure(result);
            } else {
                self.plan_restart();
            }
            return;
        }
        self.run = Some(Arc::clone(&run));
        if !found || !matches!(state, VmState::Running | VmState::Paused) {
            // A start or stop was under way: its steps are not known, so the VM is brought to a clean end.
            let result = self.end(Ending::Kill, ExitReason::Lost).await;
            self.log_failure(result);
            return;
        }
        tokio::spawn(follow_live(run, self.live.clone()));
        tracing::info!(vm = %self.record.name, "found a running VM again");
    }

    fn log_failure(&self, result: Result<(), VmError>) {
        if let Err(error) = result {
            tracing::warn!(vm = %self.record.name, causes = ?chain(&error), "while taking over a VM");
        }
    }

    /// Writes a new life to the database, then announces it.
    async fn save(&mut self, life: Life) -> Result<(), VmError> {
        let (id, update) = (self.record.id.clone(), life.to_update());
        self.parts
            .db
            .call(move |db| db.update_vm_run(&id, &update))
            .await?;
        self.record.life = life;
        self.announce();
        Ok(())
    }

    fn announce(&self) {
        self.view.send_replace(Arc::new(self.record.clone()));
    }

    /// Keeps the stages of an operation. They are for people: a full disk must not fail the operation.
    async fn keep(&self, stages: Stages) {
        let (id, operation) = (self.record.id.clone(), stages.operation());
        let timings = stages.into_timings();
        let kept = self
            .parts
            .db
            .call(move |db| db.put_stages(&id, operation, &timings))
            .await;
        if let Err(error) = kept {
            tracing::warn!(vm = %self.record.name, %error, "cannot keep the timings");
        }
    }
}

/// Waits for what a run does by itself, or for a restart that is due.
async fn next_event(
    run: Option<Arc<Run>>,
    restart_at: Option<tokio::time::Instant>,
    degraded: &[String],
) -> Event {
    let Some(run) = run else {
        return match restart_at {
            Some(at) => {
                tokio::time::sleep_until(at).await;
                Event::RestartDue
            }
            None => std::future::pending().await,
        };
    };
    let vmm = async {
        match run.machine() {
            Some(machine) => run.note_vmm_exit(machine.wait_exit().await.cause),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        _ = run.wait_main_exit() => Event::MainExited,
        () = vmm => Event::VmmExited,
        messages = run.wait_degraded(degraded) => Event::Degraded(messages),
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

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An error's message and those of its causes, outermost first.
pub(crate) fn chain(error: &dyn std::error::Error) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut source = error.source();
    while let Some(cause) = source {
        messages.push(cause.to_string());
        source = cause.source();
    }
    messages
}

/// Deletes a folder that may be gone already.
pub(crate) fn remove_tree(path: &std::path::Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
