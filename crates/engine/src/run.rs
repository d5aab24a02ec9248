//! One run of a VM: what its capabilities share from start to stop.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use offshoot_agent_proto::client::{AgentClient, SessionCount};
use offshoot_agent_proto::v1;
use offshoot_model::{ByteSize, VmId};
use offshoot_vmm::plan::{Accel, AgentChannel, ConsoleDevice, Origin};
use offshoot_vmm::{ExitCause, LaunchPlan, Machine};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::capability::VmPlan;
use crate::definition::VmRecord;
use crate::exit::Gone;
use crate::output::OutputLog;
use crate::paths::VmPaths;
use crate::shares::Shares;
use crate::slots::Warm;

/// How a run is brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Ask: processes get this long, file systems are unmounted.
    Graceful(Duration),
    /// The disks are deleted right after: do not wait for anything.
    Discard,
    /// Like pulling the plug.
    Kill,
}

/// A guest whose main process used up all the time still gets this long to unmount its disks.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// What clients talk to while a VM runs.
#[derive(Clone)]
pub struct Live {
    /// The VMM.
    pub machine: Arc<dyn Machine>,
    /// The guest's agent.
    pub agent: AgentClient,
}

/// Where the agent's client is put when it answers, and taken away when it is lost.
#[derive(Clone)]
pub struct AgentSlot(Arc<watch::Sender<Option<AgentClient>>>);

impl AgentSlot {
    /// Says that the agent answers, or, with `None`, not any more.
    pub fn set(&self, agent: Option<AgentClient>) {
        self.0.send_replace(agent);
    }

    /// Follows it through losses and reconnections.
    pub fn watch(&self) -> watch::Receiver<Option<AgentClient>> {
        self.0.subscribe()
    }
}

/// Where the main process's status is put when it ends.
#[derive(Clone)]
pub struct MainExit(Arc<watch::Sender<Option<i32>>>);

impl MainExit {
    /// Says that it ended, with its status as a shell counts it.
    pub fn set(&self, status: i32) {
        self.0.send_replace(Some(status));
    }
}

/// Where it is said what of a running VM does not work any more.
#[derive(Clone)]
pub struct Health(Arc<watch::Sender<Vec<String>>>);

impl Health {
    /// Says that something does not work: for good in this run, or until it is mended.
    pub fn degrade(&self, message: String) {
        self.0.send_if_modified(|messages| {
            let new = !messages.contains(&message);
            if new {
                messages.push(message);
            }
            new
        });
    }

    /// Says that something works again; nothing if it never did not.
    pub fn mend(&self, message: &str) {
        self.0.send_if_modified(|messages| {
            let before = messages.len();
            messages.retain(|known| known != message);
            messages.len() != before
        });
    }
}

/// Where it is said how many sessions the guest has.
#[derive(Clone)]
pub struct Sessions(Arc<watch::Sender<SessionCount>>);

impl Sessions {
    /// Says how many there are now.
    pub fn set(&self, count: SessionCount) {
        self.0.send_replace(count);
    }
}

/// One run of a VM. Shared by reference with every hook.
pub struct Run {
    /// The VM as it was when the run began.
    pub vm: Arc<VmRecord>,
    /// Where its files lie.
    pub paths: VmPaths,
    /// What its VMM and its guest are told. Empty when the run was adopted.
    pub plan: VmPlan,
    /// Where the main process's output goes.
    pub output: OutputLog,
    /// Cancelled when the run ends: its background tasks stop.
    pub over: CancellationToken,
    /// Cancelled when the guest has said its first word, or the run ends before.
    pub booted: CancellationToken,
    /// The virtiofsds that serve it.
    pub shares: Shares,
    /// What it goes on with that took over a warm slot.
    pub(crate) warm: Option<Warm>,
    agent: AgentSlot,
    health: Health,
    sessions: Sessions,
    main_exit: MainExit,
    notes: Mutex<Notes>,
}

/// What a run learns on its way.
struct Notes {
    machine: Option<Arc<dyn Machine>>,
    ending: Ending,
    ending_since: Instant,
    host_key: Option<String>,
    guest_stages: Vec<(String, Duration)>,
    vmm_exit: Option<ExitCause>,
    causes: Vec<String>,
}

impl Run {
    /// A run that is about to begin.
    pub fn new(vm: Arc<VmRecord>, paths: VmPaths, plan: VmPlan, output: OutputLog) -> Self {
        let over = CancellationToken::new();
        Self {
            vm,
            paths,
            plan,
            output,
            booted: over.child_token(),
            over,
            shares: Shares::default(),
            warm: None,
            health: Health(Arc::new(watch::Sender::new(Vec::new()))),
            sessions: Sessions(Arc::new(watch::Sender::new(SessionCount::default()))),
            agent: AgentSlot(Arc::new(watch::Sender::new(None))),
            main_exit: MainExit(Arc::new(watch::Sender::new(None))),
            notes: Mutex::new(Notes {
                machine: None,
                ending: Ending::Kill,
                ending_since: Instant::now(),
                host_key: None,
                guest_stages: Vec::new(),
                vmm_exit: None,
                causes: Vec::new(),
            }),
        }
    }

    /// The same for a VM that takes over a warm slot: its VMM runs, its disks are mounted, its agent is connected.
    pub(crate) fn of_slot(
        vm: Arc<VmRecord>,
        paths: VmPaths,
        plan: VmPlan,
        output: OutputLog,
        warm: Warm,
    ) -> Self {
        let mut run = Self::new(vm, paths, plan, output);
        run.set_machine(Arc::clone(&warm.machine));
        run.warm = Some(warm);
        run
    }

    /// Whether it takes over a warm slot: what a slot has is there already.
    pub fn is_warm(&self) -> bool {
        self.warm.is_some()
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM, once launched.
    pub fn machine(&self) -> Option<Arc<dyn Machine>> {
        self.notes().machine.clone()
    }

    /// Says that the VMM is launched.
    pub fn set_machine(&self, machine: Arc<dyn Machine>) {
        self.notes().machine = Some(machine);
    }

    /// The agent, once it answers.
    pub fn agent(&self) -> Option<AgentClient> {
        self.agent.0.borrow().clone()
    }

    /// Where the agent's client is kept, for a task of the run.
    pub fn agent_slot(&self) -> AgentSlot {
        self.agent.clone()
    }

    /// Where the main process's status is kept, for a task of the run.
    pub fn main_exit_slot(&self) -> MainExit {
        self.main_exit.clone()
    }

    /// The main process's status, once it ended.
    pub fn main_exit(&self) -> Option<i32> {
        *self.main_exit.0.borrow()
    }

    /// Waits for the main process to end.
    pub async fn wait_main_exit(&self) -> i32 {
        let mut receiver = self.main_exit.0.subscribe();
        match receiver.wait_for(Option::is_some).await.map(|code| *code) {
            Ok(Some(code)) => code,
            // The sender lives as long as `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Where it is said what does not work any more, for a task of the run.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Waits until something else does not work any more than what is `known`; gives all of it.
    pub async fn wait_degraded(&self, known: &[String]) -> Vec<String> {
        let mut receiver = self.health.0.subscribe();
        match receiver
            .wait_for(|messages| messages != known)
            .await
            .map(|m| m.clone())
        {
            Ok(messages) => messages,
            // The sender lives as long as `self`.
            Err(_) => std::future::pending().await,
        }
    }

    /// Where it is said how many sessions the guest has, for a task of the run.
    pub fn sessions(&self) -> Sessions {
        self.sessions.clone()
    }

    /// Waits until the guest has another number of sessions than what is `known`.
    pub async fn wait_sessions(&self, known: SessionCount) -> SessionCount {
        let mut receiver = self.sessions.0.subscribe();
        match receiver
            .wait_for(|count| *count != known)
            .await
            .map(|count| *count)
        {
            Ok(count) => count,
            // The sender lives as long as `self`.
            Err(_) => std::future::pending().await,
        }
    }

    /// Notes the private key that the guest's SSH server is known by.
    pub fn set_host_key(&self, key: String) {
        self.notes().host_key = Some(key);
    }

    /// The private key that the guest's SSH server is known by, once it is there.
    pub fn host_key(&self) -> Option<String> {
        self.notes().host_key.clone()
    }

    /// How much of a hurry `stop` is in.
    pub fn ending(&self) -> Ending {
        self.notes().ending
    }

    /// Decides how the run ends, before the `stop` hooks are called.
    pub fn set_ending(&self, ending: Ending) {
        let mut notes = self.notes();
        notes.ending = ending;
        notes.ending_since = Instant::now();
    }

    /// How long the next `stop` hook may wait for the guest: what is left of the time that it was given, but never less
    /// than two seconds. `None` when nobody waits.
    pub fn grace(&self) -> Option<Duration> {
        let notes = self.notes();
        match notes.ending {
            Ending::Graceful(grace) => Some(
                grace
                    .saturating_sub(notes.ending_since.elapsed())
                    .max(LEAST_GRACE),
            ),
            Ending::Discard | Ending::Kill => None,
        }
    }

    /// Notes how long something took inside the guest.
    pub fn note_guest_stage(&self, name: &str, duration: Duration) {
        self.notes().guest_stages.push((name.to_owned(), duration));
    }

    /// What was noted of the guest's own steps.
    pub fn guest_stages(&self) -> Vec<(String, Duration)> {
        self.notes().guest_stages.clone()
    }

    /// Notes why the VMM is gone.
    pub fn note_vmm_exit(&self, cause: ExitCause) {
        self.notes().vmm_exit = Some(cause);
    }

    /// How a VMM that nobody ended came to its end.
    pub(crate) fn gone(&self) -> Gone {
        match self.notes().vmm_exit {
            Some(ExitCause::GuestPowerOff | ExitCause::GuestReset) => Gone::PoweredOff,
            Some(ExitCause::GuestPanic) => Gone::Panicked,
            _ => Gone::Died,
        }
    }

    /// Notes why the run ended, where a capability knows more than the status says.
    pub fn note_cause(&self, cause: String) {
        self.notes().causes.push(cause);
    }

    /// What was noted of why the run ended.
    pub fn causes(&self) -> Vec<String> {
        self.notes().causes.clone()
    }

    /// VMM and agent, when both are there.
    pub fn live(&self) -> Option<Live> {
        Some(Live {
            machine: self.machine()?,
            agent: self.agent()?,
        })
    }
}

/// A plan with nothing in it, for the capabilities to fill in.
pub fn empty_plan(vm: VmId) -> VmPlan {
    VmPlan {
        guest: v1::ConfigureRequest {
            vm_id: vm.to_string(),
            ..v1::ConfigureRequest::default()
        },
        objects: Vec::new(),
        launch: LaunchPlan {
            vm,
            run_dir: PathBuf::new(),
            log: PathBuf::new(),
            console: PathBuf::new(),
            cpus: 1,
            memory: ByteSize::from_mib(0),
            accel: Accel::Tcg,
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: Vec::new(),
            console_device: ConsoleDevice::default(),
            disks: Vec::new(),
            pmems: Vec::new(),
            shares: Vec::new(),
            nets: Vec::new(),
            agent: AgentChannel::VirtioSerial,
            identity: None,
            origin: Origin::Kernel,
            cgroups: Vec::new(),
        },
    }
}
