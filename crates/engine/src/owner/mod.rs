//! The task that owns one VM: the only place where its life changes.
//!
//! Requests come through a mailbox and are handled one after another. A request that ends the VM cuts a start short
//! that is under way: the start undoes itself, then the request is handled. A client that goes away changes nothing:
//! what was begun is brought to its end here. The row in the database is written, with the event that tells of it,
//! before a new state is announced.
//!
//! ```text
//! mailbox ─► handle ─► boot     plan, record, prepare, after_boot; undone backwards
//!                  └─► ending   stop, reset, remove
//! daemon started ───► found     what became of a VM whose row says that it ran
//! every minute   ───┘
//! ```

mod boot;
mod ending;
mod found;

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use offshoot_agent_proto::client::SessionCount;
use offshoot_model::{Event as HistoryEvent, EventAction, ExitReason, OperationId, VmName, VmState};
use offshoot_store::db::{NewEvent, VmWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::capability::CapabilityError;
use crate::definition::{Life, VmRecord};
use crate::engine::{Core, Registry};
use crate::error::{StageFailure, VmError};
use crate::operation::{self, Stages, Subject};
use crate::output::OutputLog;
use crate::paths::VmPaths;
use crate::request::{RequestKind, Verdict, decide};
use crate::restart::{self, Restarts};
use crate::run::{Ending, Live, Run};
use crate::slots::{self, Slot};

/// How long a guest gets to put its house in order after its main process ended by itself.
const AFTER_MAIN: Duration = Duration::from_secs(2);
/// How long a guest gets when it is stopped to be reset, or when a daemon finds it while it stops: what it keeps shall
/// be whole.
const IN_PEACE: Duration = Duration::from_secs(10);
/// How long the agent may take to pass a signal on: nobody else is served by this task meanwhile.
const ANSWER: Duration = Duration::from_secs(5);

/// One request with all it needs.
#[derive(Clone, Debug)]
pub enum Request {
    /// Boot it.
    Start,
    /// Ask its guest to end; kill it after this long.
    Stop(Duration),
    /// The same, then boot it again; boot it when it does not run.
    Restart(Duration),
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
    /// Undo a start that is under way; nothing when there is none.
    Cancel,
    /// Look whether what should be of it is so, and mend what is not.
    Tend,
}

impl Request {
    fn kind(&self) -> RequestKind {
        match self {
            Self::Start => RequestKind::Start,
            Self::Stop(_) => RequestKind::Stop,
            Self::Restart(_) => RequestKind::Restart,
            Self::Kill => RequestKind::Kill,
            Self::Signal(_) => RequestKind::Signal,
            Self::Pause => RequestKind::Pause,
            Self::Resume => RequestKind::Resume,
            Self::Reset(false) => RequestKind::Reset,
            Self::Reset(true) => RequestKind::ResetForced,
            Self::Remove(false) => RequestKind::Remove,
            Self::Remove(true) => RequestKind::RemoveForced,
            Self::Rename(_) => RequestKind::Rename,
            Self::Cancel => RequestKind::Cancel,
            Self::Tend => RequestKind::Tend,
        }
    }
}

/// A request, the operation it belongs to, and whom to answer.
pub(crate) struct Letter {
    request: Request,
    operation: OperationId,
    /// It cut a start short: when nothing is left to end, it got what it asked for.
    interrupted: bool,
    reply: oneshot::Sender<Result<Arc<VmRecord>, VmError>>,
}

/// What others see of a VM, and how they reach its owner.
#[derive(Clone)]
pub struct VmHandle {
    mailbox: mpsc::Sender<Letter>,
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
    /// Asks the owner, as part of the current operation, and waits for the answer. Dropping the future does not stop
    /// what was asked.
    pub async fn ask(&self, request: Request) -> Result<Arc<VmRecord>, VmError> {
        let (reply, answer) = oneshot::channel();
        let removed = || VmError::Removed {
            name: self.view.borrow().name.clone(),
        };
        let letter = Letter {
            request,
            operation: operation::current().unwrap_or_else(operation::new_id),
            interrupted: false,
            reply,
        };
        self.mailbox.send(letter).await.map_err(|_| removed())?;
        answer.await.map_err(|_| removed())?
    }
}

/// What happens to a run by itself.
enum Event {
    MainExited,
    VmmExited,
    RestartDue,
    Degraded(Vec<String>),
    Sessions(SessionCount),
}

pub(crate) struct Owner {
    core: Arc<Core>,
    registry: Arc<Registry>,
    record: VmRecord,
    paths: VmPaths,
    output: OutputLog,
    view: watch::Sender<Arc<VmRecord>>,
    live: watch::Sender<Option<Live>>,
    run: Option<Arc<Run>>,
    /// When the current run became ready, if this daemon started it.
    running_since: Option<std::time::Instant>,
    /// How long the last run was ready, if this daemon started it.
    ran_for: Option<Duration>,
    /// What could not be written and is true all the same: a disk was full when a run ended.
    unsaved: Option<(Life, VmWrite)>,
    /// How often in a row it was started again, and when that is due next.
    restarts: Restarts,
    restart_at: Option<tokio::time::Instant>,
    removed: bool,
    /// What it takes over when it is started soon.
    slot: Option<Box<Slot>>,
}

/// How an owner comes to its VM.
pub(crate) enum Beginning {
    /// It was just created, in a warm slot perhaps.
    New(Option<Box<Slot>>),
    /// It was there before this daemon: look for what is left running.
    Found,
}

impl Owner {
    /// Starts the task for a VM whose row is written.
    pub(crate) fn spawn(
        core: Arc<Core>,
        registry: Arc<Registry>,
        record: VmRecord,
        output: OutputLog,
        beginning: Beginning,
    ) -> VmHandle {
        let paths = core.parts.paths(&record.id);
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
        let (slot, adopt) = match beginning {
            Beginning::New(slot) => (slot, false),
            Beginning::Found => (None, true),
        };
        let owner = Self {
            slot,
            core,
            registry,
            record,
            paths,
            output,
            view,
            live,
            run: None,
            running_since: None,
            ran_for: None,
            unsaved: None,
            restarts: Restarts::default(),
            restart_at: None,
            removed: false,
        };
        tokio::spawn(owner.live_on(letters, adopt));
        handle
    }

    async fn live_on(mut self, mut letters: mpsc::Receiver<Letter>, adopt: bool) {
        if adopt {
            self.as_operation(operation::new_id(), async |owner| owner.adopt().await)
                .await;
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
                    event = next_event(self.run.clone(), self.restart_at, &self.record.life) => {
                        let (letters, waiting) = (&mut letters, &mut waiting);
                        self.as_operation(operation::new_id(), async |owner| {
                            owner.handle_event(event, letters, waiting).await;
                        })
                        .await;
                        continue;
                    }
                },
            };
            let Letter {
                request,
                operation,
                interrupted,
                reply,
            } = letter;
            let (letters, waiting) = (&mut letters, &mut waiting);
            let answer = self
                .as_operation(operation, async |owner| {
                    match owner.handle(request, letters, waiting).await {
                        Err(VmError::WrongState { .. }) if interrupted => Ok(()),
                        answer => answer,
                    }
                })
                .await;
            // Whoever asked may have gone; the answer is in the database too.
            let _ = reply.send(answer.map(|()| Arc::new(self.record.clone())));
        }
        for letter in waiting {
            let _ = letter.reply.send(Err(VmError::Removed {
                name: self.record.name.clone(),
            }));
        }
    }

    /// Runs `work` as the operation `id`: its log lines, events and errors carry it.
    async fn as_operation<T>(&mut self, id: OperationId, work: impl AsyncFnOnce(&mut Self) -> T) -> T {
        let span = tracing::info_span!("operation", op = %id, vm = %self.record.name);
        operation::within(id, work(self)).instrument(span).await
    }

    async fn handle(
        &mut self,
        request: Request,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) -> Result<(), VmError> {
        self.settle().await?;
        let kind = request.kind();
        match decide(self.record.life.state, kind) {
            Verdict::Do => {}
            Verdict::AlreadySo => {
                if kind == RequestKind::Stop {
                    self.hold().await?;
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
            Request::Start => self.start_as_asked(letters, waiting).await,
            Request::Stop(grace) => {
                self.end(Ending::Graceful(grace), ExitReason::Stopped).await?;
                self.remove_if_asked().await
            }
            Request::Restart(grace) => {
                self.end(Ending::Graceful(grace), ExitReason::Stopped).await?;
                self.start_as_asked(letters, waiting).await
            }
            Request::Kill => {
                self.end(Ending::Kill, ExitReason::Killed).await?;
                self.remove_if_asked().await
            }
            Request::Signal(signal) => self.signal(signal).await,
            Request::Pause => self.set_paused(true).await,
            Request::Resume => self.set_paused(false).await,
            Request::Reset(_) => {
                self.give_slot_back().await;
                self.end(Ending::Graceful(IN_PEACE), ExitReason::Stopped).await?;
                self.reset().await
            }
            Request::Remove(_) => {
                self.announce_removal().await?;
                self.give_slot_back().await;
                self.end(Ending::Discard, ExitReason::Killed).await?;
                self.remove().await
            }
            Request::Rename(name) => self.rename(name).await,
            // A start that was under way is undone by now: it comes before this in the order.
            Request::Cancel => Ok(()),
            Request::Tend => {
                self.tend().await;
                Ok(())
            }
        }
    }

    /// Ends the slot that it took and did not use.
    async fn give_slot_back(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.end(&self.core).await;
        }
    }

    /// A start that somebody asked for.
    async fn start_as_asked(
        &mut self,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) -> Result<(), VmError> {
        self.restarts = Restarts::default();
        let started = self.start_interruptibly(letters, waiting).await;
        if started.is_err() {
            self.remove_if_asked().await?;
        }
        started
    }

    /// Removes a VM that does not run any more and was made with `--rm`.
    async fn remove_if_asked(&mut self) -> Result<(), VmError> {
        if self.record.definition.config.auto_remove {
            self.remove().await?;
        }
        Ok(())
    }

    async fn handle_event(
        &mut self,
        event: Event,
        letters: &mut mpsc::Receiver<Letter>,
        waiting: &mut VecDeque<Letter>,
    ) {
        let result = match event {
            Event::Degraded(messages) => return self.degrade(messages).await,
            Event::Sessions(count) => {
                self.record.life.sessions = count;
                return self.announce(&[]);
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
        self.log_failure("after an event of the VM's own", result);
        self.after_a_run().await;
    }

    /// What follows when a VM ended by itself: it goes, or it is started again, or nothing.
    async fn after_a_run(&mut self) {
        if self.run.is_some() || self.removed {
            return;
        }
        if self.record.definition.config.auto_remove {
            let removed = self.remove().await;
            self.log_failure("cannot remove a VM that was started with --rm", removed);
        } else if restart::after_end(self.record.definition.config.restart, &self.record.life) {
            // By the clock that does not jump; a run of an earlier daemon counts as a short one.
            let run = self.ran_for.take();
            self.restart_at = Some(tokio::time::Instant::now() + self.restarts.next_pause(run));
        }
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
                Some(mut letter) = letters.recv() => {
                    if letter.request.kind().interrupts_start() {
                        cancel.cancel();
                        letter.interrupted = true;
                    }
                    waiting.push_back(letter);
                }
            }
        }
    }

    async fn signal(&mut self, signal: u32) -> Result<(), VmError> {
        let name = self.record.name.clone();
        let agent = self.run.as_ref().and_then(|run| run.agent());
        let silent = || VmError::NoAgent {
            name: name.clone(),
            operation: "signal",
        };
        let agent = agent.ok_or_else(silent)?;
        let answer = tokio::time::timeout(ANSWER, agent.signal_main(signal)).await;
        answer.map_err(|_| silent())?.map_err(|error| VmError::Machine {
            name: name.clone(),
            operation: "signal",
            source: StageFailure(Box::new(error)),
        })
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), VmError> {
        let (operation, state, action) = if paused {
            ("pause", VmState::Paused, EventAction::Pause)
        } else {
            ("resume", VmState::Running, EventAction::Resume)
        };
        let Some(machine) = self.run.as_ref().and_then(|run| run.machine()) else {
            return Ok(());
        };
        let mut stages = self.begin(operation);
        let halted = async {
            if paused {
                machine.pause().await
            } else {
                machine.resume().await
            }
        };
        let result = stages.stage("vmm", halted).await;
        result.map_err(|error| VmError::Machine {
            name: self.record.name.clone(),
            operation,
            source: StageFailure(Box::new(error)),
        })?;
        let life = Life {
            state,
            ..self.record.life.clone()
        };
        let event = self.event(action, "");
        stages.stage("row", self.save(life, Some(event))).await
    }

    async fn rename(&mut self, name: VmName) -> Result<(), VmError> {
        let id = self.record.id.clone();
        let event = NewEvent {
            vm_name: Some(name.clone()),
            ..self.event(EventAction::Rename, format!("was `{}`", self.record.name))
        };
        let new = name.clone();
        let mut stages = self.begin("rename");
        let written = self
            .core
            .parts
            .db
            .call(move |db| db.rename_vm(&id, &new, &[event]));
        let events = stages.stage("row", written).await?;
        self.record.name = name;
        self.announce(&events);
        Ok(())
    }

    async fn degrade(&mut self, messages: Vec<String>) {
        let without = |these: &[String], those: &[String]| -> Vec<String> {
            let new = these.iter().filter(|message| !those.contains(message));
            new.cloned().collect()
        };
        let known = &self.record.life.degraded;
        let (new, over) = (without(&messages, known), without(known, &messages));
        let event = if new.is_empty() {
            self.event(EventAction::Repair, format!("over: {}", over.join("; ")))
        } else {
            self.event(EventAction::Degrade, new.join("; "))
        };
        self.record.life.degraded = messages;
        self.announce(&[]);
        let told = self.core.events.record(event).await;
        self.log_failure("cannot keep an event", told.map_err(VmError::from));
    }

    /// Notes that somebody stopped it, so that it is not started again by itself.
    async fn hold(&mut self) -> Result<(), VmError> {
        self.restart_at = None;
        if self.record.life.held {
            return Ok(());
        }
        let life = Life {
            held: true,
            ..self.record.life.clone()
        };
        self.save(life, None).await
    }

    fn stage_error(&self, operation: &'static str, stage: String, error: CapabilityError) -> VmError {
        VmError::Stage {
            name: self.record.name.clone(),
            operation,
            stage,
            source: StageFailure(error),
            findings: Vec::new(),
        }
    }

    fn log_failure(&self, what: &str, result: Result<(), VmError>) {
        if let Err(error) = result {
            tracing::warn!(vm = %self.record.name, causes = ?chain(&error), "{what}");
        }
    }

    /// An event of this VM, now, in the current operation.
    fn event(&self, action: EventAction, reason: impl Into<String>) -> NewEvent {
        NewEvent {
            time_ms: now_ms(),
            action,
            vm_id: Some(self.record.id.clone()),
            vm_name: Some(self.record.name.clone()),
            operation: operation::current(),
            reason: reason.into(),
        }
    }

    /// Writes a new life and what happened to the database, then announces both.
    async fn save(&mut self, life: Life, event: Option<NewEvent>) -> Result<(), VmError> {
        let write = VmWrite {
            events: event.into_iter().collect(),
            objects: None,
        };
        self.save_with(life, write).await
    }

    /// The same, with what the VM has or is about to get in the kernel.
    async fn save_with(&mut self, life: Life, write: VmWrite) -> Result<(), VmError> {
        let (id, update) = (self.record.id.clone(), life.to_update());
        let events = self
            .core
            .parts
            .db
            .call(move |db| db.update_vm_run(&id, &update, &write))
            .await?;
        self.record.life = life;
        self.announce(&events);
        Ok(())
    }

    /// Writes what is true already, however long that takes: until it is written, the next request tries again.
    async fn save_surely(&mut self, life: Life, write: VmWrite) -> Result<(), VmError> {
        let saved = self.save_with(life.clone(), write.clone()).await;
        if saved.is_err() {
            self.unsaved = Some((life, write));
        }
        saved
    }

    /// Catches up with what could not be written or is not known any more.
    async fn settle(&mut self) -> Result<(), VmError> {
        if let Some((life, write)) = self.unsaved.take() {
            self.save_surely(life, write).await?;
        }
        if self.record.life.state.has_vmm() && self.run.is_none() {
            self.adopt().await;
        }
        Ok(())
    }

    fn announce(&self, events: &[HistoryEvent]) {
        self.view.send_replace(Arc::new(self.record.clone()));
        self.core.events.announce(events);
    }

    /// An operation on this VM begins now.
    fn begin(&self, operation: &'static str) -> Stages {
        let subject = Subject {
            vm: Some(self.record.id.clone()),
            name: self.record.name.to_string(),
        };
        self.core.operations.begin(operation, subject)
    }
}

/// Waits for what a run does by itself, or for a restart that is due.
async fn next_event(run: Option<Arc<Run>>, restart_at: Option<tokio::time::Instant>, life: &Life) -> Event {
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
        messages = run.wait_degraded(&life.degraded) => Event::Degraded(messages),
        count = run.wait_sessions(life.sessions) => Event::Sessions(count),
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
