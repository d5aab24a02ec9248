//! The agent: the conversation with the guest, from its first word to its last.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use offshoot_agent_proto::client::{AgentClient, CallError, ConnectError, SessionCount};
use offshoot_agent_proto::v1;
use offshoot_model::{ErrorKind, Explain, Finding, VmId};
use offshoot_vmm::plan::Origin;
use offshoot_vmm::{AgentEndpoint, ExitCause, Machine};
use sha2::{Digest as _, Sha256};

use crate::capability::{Capability, CapabilityError};
use crate::run::{AgentSlot, Run, Sessions};
use crate::templates;

/// Connects to the agent, makes the guest this VM, and shuts it down.
pub struct AgentCapability {
    /// How long a guest may take from the launch of its VMM to its first word.
    pub boot_timeout: Duration,
}

/// The guest did not come up, or does not do what it is told.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("the guest did not come up within {limit:?}{}", last_words(console))]
    Timeout { limit: Duration, console: String },
    #[error("the guest ended while it booted ({exit}){}", last_words(console))]
    Ended { exit: ExitCause, console: String },
    #[error("cannot connect to the agent")]
    Connect(#[source] ConnectError),
    #[error("the guest cannot become this VM")]
    Configure(#[source] CallError),
    #[error("there is no VMM to ask for the agent")]
    NoMachine,
    #[error("no random bytes for the guest")]
    Entropy(#[source] std::io::Error),
}

fn last_words(console: &str) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("; its last words: {console}")
    }
}

impl Explain for AgentError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect(source) => source.kind(),
            Self::Configure(source) => source.kind(),
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        vec!["see the guest's console with `offshoot logs --console VM`, or give it more --memory".into()]
    }
}

/// How long a guest may take to answer that was restored: it has nothing to do but that. Ten at once on two busy processors,
/// emulated, were seen to take 20 s.
const GO_ON: Duration = Duration::from_secs(60);
/// How often a lost agent is looked for again, at first; doubled up to a second.
const RETRY: Duration = Duration::from_millis(20);
/// A guest that opens and closes sessions all the time is not followed faster than this.
const COUNT_PAUSE: Duration = Duration::from_millis(20);
/// How long a stop waits for an agent that does not answer now: a daemon that was restarted finds it within some
/// milliseconds.
const REAPPEARING: Duration = Duration::from_secs(1);
/// How much of the console is worth repeating in an error.
const LAST_WORDS: usize = 400;

impl AgentCapability {
    /// Waits for the guest's first word, its end, or the time limit.
    async fn first_contact(&self, run: &Run) -> Result<AgentClient, AgentError> {
        let machine = run.machine().ok_or(AgentError::NoMachine)?;
        let door = Door::of(&*machine);
        let limit = match run.plan.launch.origin {
            Origin::Template(_) => self.boot_timeout.min(GO_ON),
            _ => self.boot_timeout,
        };
        tokio::select! {
            connected = door.enter() => connected.map_err(AgentError::Connect),
            exit = machine.wait_exit() => {
                Err(AgentError::Ended { exit: exit.cause, console: console_tail(&*machine).await })
            }
            () = tokio::time::sleep(limit) => {
                Err(AgentError::Timeout { limit, console: console_tail(&*machine).await })
            }
        }
    }
}

/// The machine-id(5) of a VM: the same at each of its starts, and no other VM's.
fn machine_id(vm: &VmId) -> String {
    let hash = Sha256::digest(format!("offshoot machine-id {vm}"));
    hash[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The way to one guest's agent.
#[derive(Clone)]
struct Door {
    endpoint: AgentEndpoint,
    /// The VMM.
    pid: u32,
}

impl Door {
    fn of(machine: &dyn Machine) -> Self {
        Self {
            endpoint: machine.agent_endpoint().clone(),
            pid: machine.state().process.pid,
        }
    }

    /// Connects, however long the guest takes to boot. Dropping the future is safe.
    async fn enter(&self) -> Result<AgentClient, ConnectError> {
        match &self.endpoint {
            AgentEndpoint::UnixLink(path) => AgentClient::connect_unix_link(path).await,
            AgentEndpoint::HybridVsock { path, port } => {
                AgentClient::connect_hybrid_vsock(path, *port, Some(self.pid)).await
            }
        }
    }
}

async fn console_tail(machine: &dyn Machine) -> String {
    let bytes = machine.console_tail(LAST_WORDS).await.unwrap_or_default();
    let printable = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    String::from_utf8_lossy(&bytes)
        .trim()
        .chars()
        .map(printable)
        .collect()
}

/// Says that the agent answers, and looks for it again whenever it is said not to, until the run is over.
fn keep_connected(run: &Run, link: RunLink) {
    let over = run.over.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = over.cancelled() => {}
            () = link.keep() => {}
        }
    });
}

/// What the keeper needs of a run without holding the run itself.
struct RunLink {
    door: Door,
    agent: AgentSlot,
}

impl RunLink {
    async fn keep(&self) {
        let mut watched = self.agent.watch();
        loop {
            if watched.wait_for(Option::is_none).await.map(drop).is_err() {
                return;
            }
            let mut pause = RETRY;
            loop {
                match self.door.enter().await {
                    Ok(client) => {
                        self.agent.set(Some(client));
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the agent does not answer yet");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_secs(1));
                    }
                }
            }
        }
    }
}

/// Follows how many sessions the guest has, until the run is over.
fn keep_counting(run: &Run) {
    let (over, slot, sessions) = (run.over.clone(), run.agent_slot(), run.sessions());
    tokio::spawn(async move {
        tokio::select! {
            () = over.cancelled() => {}
            () = count_sessions(&slot, &sessions) => {}
        }
    });
}

async fn count_sessions(slot: &AgentSlot, sessions: &Sessions) {
    let mut watched = slot.watch();
    loop {
        let agent = match watched.wait_for(Option::is_some).await {
            Ok(agent) => agent.clone(),
            Err(_) => return,
        };
        if let Some(agent) = agent
            && let Err(error) = follow_sessions(&agent, sessions).await
        {
            tracing::debug!(%error, "sessions are not counted until the agent is there again");
        }
        sessions.set(SessionCount::default());
        if watched.changed().await.is_err() {
            return;
        }
    }
}

/// Passes on the numbers of one connection, not more often than every [`COUNT_PAUSE`].
async fn follow_sessions(agent: &AgentClient, sessions: &Sessions) -> Result<(), CallError> {
    let mut counts = agent.sessions().await?;
    while let Some(count) = counts.next().await {
        let mut latest = count?;
        sessions.set(latest);
        let mut pause = std::pin::pin!(tokio::time::sleep(COUNT_PAUSE));
        loop {
            tokio::select! {
                () = &mut pause => break,
                count = counts.next() => match count {
                    Some(count) => latest = count?,
                    None => return Ok(()),
                },
            }
        }
        sessions.set(latest);
    }
    Ok(())
}

#[async_trait]
impl Capability for AgentCapability {
    fn name(&self) -> &'static str {
        "agent"
    }

    async fn check(&self) -> Vec<Finding> {
        vec![vsock(std::path::Path::new("/dev/vhost-vsock").exists())]
    }

    async fn after_boot(&self, run: &Run) -> Result<(), CapabilityError> {
        let began = std::time::Instant::now();
        let agent = match &run.warm {
            Some(warm) => warm.agent.clone(),
            None => self.first_contact(run).await.map_err(boxed)?,
        };
        run.booted.cancel();
        let restored = matches!(run.plan.launch.origin, Origin::Template(_));
        run.note_guest_stage(if restored { "answer" } else { "boot" }, began.elapsed());
        let mut entropy = vec![0; 64];
        offshoot_sys::random::fill(&mut entropy).map_err(|source| boxed(AgentError::Entropy(source)))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut request = v1::ConfigureRequest {
            hostname: run.vm.name.to_string(),
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            entropy: entropy.into(),
            machine_id: machine_id(&run.vm.id),
            restored: restored.then(|| v1::Restored {
                mac: templates::MAC.to_string(),
            }),
            ..run.plan.guest.clone()
        };
        if let (Some(ssh), Some(key)) = (&mut request.ssh, run.host_key()) {
            ssh.host_key = key;
        }
        // A restored one that hangs shall not hold its VM up for as long as a boot may take: it is booted instead.
        let limit = if restored {
            self.boot_timeout.min(GO_ON)
        } else {
            self.boot_timeout
        };
        let configured = tokio::time::timeout(limit, agent.configure(request)).await;
        let Ok(configured) = configured else {
            let console = match run.machine() {
                Some(machine) => console_tail(&*machine).await,
                None => String::new(),
            };
            return Err(boxed(AgentError::Timeout { limit, console }));
        };
        let stages = configured.map_err(|source| boxed(AgentError::Configure(source)))?;
        for (name, duration) in stages {
            run.note_guest_stage(&name, duration);
        }
        run.agent_slot().set(Some(agent));
        self.adopt(run).await
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(machine) = run.machine() else {
            return Ok(());
        };
        let door = Door::of(&*machine);
        keep_connected(
            run,
            RunLink {
                door,
                agent: run.agent_slot(),
            },
        );
        keep_counting(run);
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(grace) = run.grace() else { return Ok(()) };
        let asked = match agent_of(run).await {
            Some(agent) => match agent.shutdown(grace).await {
                Ok(true) => true,
                Ok(false) => {
                    tracing::warn!(vm = %run.vm.name, "the guest could not unmount everything; its journal will mend it");
                    true
                }
                Err(error) => {
                    tracing::warn!(vm = %run.vm.name, %error, "the agent did not shut the guest down");
                    false
                }
            },
            None => false,
        };
        if !asked {
            press_power_button(run).await;
        }
        Ok(())
    }
}

/// Says how guests are spoken to. Not having vsock costs nothing: the agent comes over virtio-serial.
fn vsock(present: bool) -> Finding {
    let (id, message) = if present {
        (
            "vsock",
            "guests are spoken to over virtio-serial; there is /dev/vhost-vsock, too",
        )
    } else {
        (
            "vsock-absent",
            "guests are spoken to over virtio-serial; there is no /dev/vhost-vsock, and none is needed",
        )
    };
    Finding::ok("agent", message).id(id)
}

/// The agent, if it answers; one that a daemon has just begun to look for gets a moment.
async fn agent_of(run: &Run) -> Option<AgentClient> {
    let mut slot = run.agent_slot().watch();
    let found = tokio::time::timeout(REAPPEARING, slot.wait_for(Option::is_some)).await;
    found.ok()?.ok()?.clone()
}

/// Asks a guest whose agent does not answer in the way that every machine has, and gives it the rest of its time.
async fn press_power_button(run: &Run) {
    let (Some(machine), Some(grace)) = (run.machine(), run.grace()) else {
        return;
    };
    tracing::info!(vm = %run.vm.name, "the agent does not answer: pressing the power button");
    if let Err(error) = machine.power_button().await {
        tracing::warn!(vm = %run.vm.name, %error, "cannot press the power button");
        return;
    }
    if tokio::time::timeout(grace, machine.wait_exit()).await.is_err() {
        tracing::warn!(vm = %run.vm.name, ?grace, "the guest does not switch itself off; its VMM is ended");
    }
}

fn boxed(error: AgentError) -> CapabilityError {
    Box::new(error)
}
