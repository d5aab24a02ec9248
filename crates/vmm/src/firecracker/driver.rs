//! Starting Firecracker and finding it again.
//!
//! ```text
//! validate ─► requests ─► own folder ─► spawn ─► machine.json ─► its socket ─┬─► requests, one by one ─► start ─┬─► Machine
//!    pure       pure                                                          └─► the saved VM is loaded ────────┘
//!                             └──────────── a guard undoes these when a later step fails ────────────┘
//! ```

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use offshoot_sys::process::{DetachedCommand, Exit, InheritedFd, PidFd, spawn_detached};
use offshoot_sys::tap;
use tokio::sync::OnceCell;

use super::machine::{FirecrackerMachine, Traits};
use super::probe::FirecrackerFacts;
use super::requests::{AGENT_SOCKET, Action, ActionType, Request, links, request, requests, restore, shape};
use crate::ask::ask;
use crate::console::{Console, pipe_of_process, pipe_that_lasts};
use crate::driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts};
use crate::http::Api;
use crate::machine::{AgentEndpoint, ControlError, Machine, MachineError, MachineState};
use crate::plan::{AgentChannel, LaunchPlan, NetBackend, Origin};
use crate::process::{self, Program, Taps, Ways};
use crate::saved::inherit;
use crate::tended::{Launched, Tended, make_own_folder, own_folder, remove_files, take_back};
use crate::words::Words;

/// The name of this driver in stored states.
pub(crate) const KIND: &str = "firecracker";
/// Under which number it gets the memory for its log.
const LOG_FD: i32 = 13;
/// Between two looks for its socket: it takes some milliseconds to make it, and says so to nobody.
const LOOK: Duration = Duration::from_millis(1);

const WAYS: Ways = Ways {
    taps: Taps::Named,
    io_uring: false,
};

/// Which Firecracker, and how it is run.
#[derive(Clone, Debug)]
pub struct FirecrackerConfig {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its environment, whole. It needs none.
    pub env: Vec<(String, String)>,
    /// Files and folders that it reads besides itself, `/usr` and `/lib`: what it was linked against elsewhere.
    pub files: Vec<PathBuf>,
    /// How long it may take to answer a request.
    pub patience: Duration,
}

impl FirecrackerConfig {
    /// One at `program`. A healthy one answers within some milliseconds; a snapshot or a slow disk takes seconds.
    pub fn at(program: PathBuf) -> Self {
        Self {
            program,
            env: Vec::new(),
            files: Vec::new(),
            patience: Duration::from_secs(10),
        }
    }
}

/// The driver of Firecracker.
#[derive(Debug)]
pub struct FirecrackerDriver {
    config: FirecrackerConfig,
    facts: OnceCell<FirecrackerFacts>,
}

impl FirecrackerDriver {
    /// A driver that has not looked at its program yet.
    pub fn new(config: FirecrackerConfig) -> Self {
        Self {
            config,
            facts: OnceCell::new(),
        }
    }

    /// What this Firecracker can do; asked once.
    pub async fn facts(&self) -> Result<&FirecrackerFacts, ProbeError> {
        let asked = async {
            let program = &self.config.program;
            let said = ask(program, KIND, &self.config.env, &["--version"]).await?;
            FirecrackerFacts::read(program, &said)
        };
        self.facts.get_or_try_init(|| asked).await
    }

    fn api(&self, run_dir: &Path, pid: u32) -> Api {
        Api {
            socket: own_folder(run_dir).join("api.sock"),
            prefix: "",
            maker: Some(pid),
            patience: self.config.patience,
        }
    }
}

#[async_trait]
impl Driver for FirecrackerDriver {
    fn kind(&self) -> &'static str {
        KIND
    }

    async fn probe(&self) -> Result<VmmFacts, ProbeError> {
        Ok(self.facts().await?.to_vmm_facts(&self.config.program))
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<Box<dyn Machine>, LaunchError> {
        plan.validate().map_err(|source| LaunchError::Plan { source })?;
        let facts = self
            .facts()
            .await
            .map_err(|source| LaunchError::Probe { source })?;
        let own = own_folder(&plan.run_dir);
        // What it cannot do is refused before anything is made.
        requests(plan, facts, &vec![String::new(); plan.nets.len()])?;
        let started = Instant::now();
        let prepare = |path: &Path| {
            let path = path.to_owned();
            |source| LaunchError::Prepare { path, source }
        };
        let words = Words::new("vmm-words").map_err(prepare(&plan.log))?;
        let log = Words::new("vmm-log").map_err(prepare(&plan.log))?;
        let (stdout, console) = pipe_that_lasts().map_err(prepare(&plan.console))?;

        let mut launched = Launched::new(&plan.run_dir);
        make_own_folder(plan)
            .and_then(|folder| make_links(plan, &folder))
            .map_err(prepare(&own))?;
        let mut command = self.command(plan, &own);
        command.stdout = Some(stdout);
        command.output = Some(words.writer().map_err(prepare(&plan.log))?);
        command.inherit.push(InheritedFd {
            fd: log.writer().map_err(prepare(&plan.log))?,
            number: LOG_FD,
        });
        inherit(&plan.origin, &mut command).map_err(prepare(Path::new("/proc/self/fd")))?;
        let taps = taps(plan, &mut command)?;
        let restored = matches!(plan.origin, Origin::Template(_));
        let list = if restored {
            vec![restore(&taps)]
        } else {
            let mut list = requests(plan, facts, &taps)?;
            list.push(start());
            list
        };

        let (process, pidfd) = spawn_detached(command).map_err(|source| LaunchError::Spawn { source })?;
        launched.process = Some(pidfd.clone());
        let port = match plan.agent {
            AgentChannel::HybridVsock { port, .. } => port,
            AgentChannel::VirtioSerial => 0,
        };
        let api = self.api(&plan.run_dir, process.pid);
        let state = MachineState {
            driver: KIND.into(),
            vm: plan.vm.clone(),
            process,
            run_dir: plan.run_dir.clone(),
            control: api.socket.clone(),
            agent: AgentEndpoint::HybridVsock {
                path: own.join(AGENT_SOCKET),
                port,
            },
            console: plan.console.clone(),
            log: plan.log.clone(),
            disks: plan
                .disks
                .iter()
                .map(|disk| (disk.serial.clone(), disk.path.clone()))
                .collect(),
        };
        let record = plan.run_dir.join(MachineState::FILE);
        state.save().map_err(prepare(&record))?;
        let console = Console::start(console, plan.console.clone());
        let spawned = started.elapsed();
        if let Err((doing, source)) = configure(&api, &pidfd, &list).await {
            let words = [&words, &log];
            return Err(if restored {
                restore_failure(plan, &words, &pidfd, doing, source).await
            } else {
                failure(plan, &words, &pidfd, doing, source).await
            });
        }
        release_taps(plan, &pidfd, &state);
        tracing::debug!(vm = %plan.vm, pid = state.process.pid, ?spawned, ready = ?started.elapsed(), "Firecracker runs");
        launched.keep();
        let tended = Tended::new(state, pidfd, vec![words, log], Some(console));
        let traits = Traits {
            saves: matches!(plan.origin, Origin::KernelInto(_)),
            deaf_after_pause: facts.deaf_after_pause,
        };
        Ok(Box::new(FirecrackerMachine::start(tended, api, traits)))
    }

    async fn shape(&self, plan: &LaunchPlan) -> Result<Option<String>, LaunchError> {
        let facts = self
            .facts()
            .await
            .map_err(|source| LaunchError::Probe { source })?;
        shape(plan, facts).map(Some)
    }

    async fn reopen(&self, state: &MachineState) -> Result<Option<Box<dyn Machine>>, ReopenError> {
        if state.driver != KIND {
            return Err(ReopenError::Driver {
                wanted: KIND,
                found: state.driver.clone(),
            });
        }
        let pid = state.process.pid;
        let held = PidFd::open(&state.process).map_err(|source| ReopenError::Process { pid, source })?;
        let Some(pidfd) = held else {
            remove_files(state);
            return Ok(None);
        };
        let api = self.api(&state.run_dir, pid);
        let answer = tokio::select! {
            biased;
            answer = api.get("/") => answer,
            _ = pidfd.wait_exit() => {
                remove_files(state);
                return Ok(None);
            }
        };
        if let Err(source) = answer {
            let source = MachineError::Control {
                doing: "take over the VMM",
                source,
            };
            return Err(ReopenError::Control { pid, source });
        }
        let unreachable = |what: &'static str| move |error: &std::io::Error| tracing::warn!(vm = %state.vm, %error, "cannot reach {what}");
        let words = [Words::of_process(pid), Words::of_descriptor(pid, LOG_FD)];
        let words = words
            .into_iter()
            .filter_map(|words| words.inspect_err(unreachable("what a VMM says")).ok());
        let console = pipe_of_process(pid, 1)
            .inspect_err(unreachable("a guest's console"))
            .ok()
            .map(|pipe| Console::start(pipe, state.console.clone()));
        let tended = Tended::new(state.clone(), pidfd, words.collect(), console);
        let traits = Traits {
            // Whoever wanted to save it is gone.
            saves: false,
            deaf_after_pause: self.facts().await.is_ok_and(|facts| facts.deaf_after_pause),
        };
        Ok(Some(Box::new(FirecrackerMachine::start(tended, api, traits))))
    }
}

impl FirecrackerDriver {
    fn command(&self, plan: &LaunchPlan, own: &Path) -> DetachedCommand {
        let id = format!("offshoot-{}", plan.vm);
        let log = format!("/proc/self/fd/{LOG_FD}");
        let words = [
            "--api-sock",
            "api.sock",
            "--id",
            &id,
            "--level",
            "Warn",
            "--log-path",
            &log,
        ];
        let args = words.map(Into::into).to_vec();
        let program = Program {
            path: &self.config.program,
            env: &self.config.env,
            files: &self.config.files,
        };
        let mut command = process::command(program, args, plan, WAYS, Vec::new());
        own.clone_into(&mut command.cwd);
        command
    }
}

/// The names of the plan's TAPs. One that is open already is let go of: it stays for its new owner, who opens it by name
/// in its namespace.
fn taps(plan: &LaunchPlan, command: &mut DetachedCommand) -> Result<Vec<String>, LaunchError> {
    let mut names = Vec::new();
    for net in &plan.nets {
        names.push(match &net.backend {
            NetBackend::Tap(name) => name.clone(),
            NetBackend::TapFd(slot) => {
                let open = slot.take().ok_or(LaunchError::NoTap { mac: net.mac })?;
                let owner = plan.identity.as_ref().map(|who| who.uid);
                let handed = tap::hand_over(&open, owner).map_err(|source| LaunchError::Prepare {
                    path: "/dev/net/tun".into(),
                    source,
                })?;
                command.network = Some(handed.namespace);
                handed.name
            }
        });
    }
    Ok(names)
}

/// Makes TAPs that were handed over end with the VMM, which has them open now. Where that fails, they are removed when the
/// VM stops.
fn release_taps(plan: &LaunchPlan, process: &PidFd, state: &MachineState) {
    if plan
        .nets
        .iter()
        .any(|net| matches!(net.backend, NetBackend::TapFd(_)))
        && let Err(error) = tap::end_with_process(process, state.process.pid)
    {
        tracing::warn!(vm = %plan.vm, %error, "a TAP will outlive its VMM until the VM is stopped");
    }
}

/// Makes the links by which it knows the plan's files.
fn make_links(plan: &LaunchPlan, own: &Path) -> io::Result<()> {
    links(plan)
        .iter()
        .try_for_each(|(link, path)| symlink(path, own.join(link)))
}

/// The last request of a boot.
fn start() -> Request {
    let action = Action {
        action_type: ActionType::InstanceStart,
    };
    request("start the guest", "/actions".into(), &action)
}

/// Makes a fresh Firecracker this VM; else what could not be done.
async fn configure(api: &Api, process: &PidFd, list: &[Request]) -> Result<(), (&'static str, ControlError)> {
    let all = async {
        wait_for_socket(api)
            .await
            .map_err(|source| ("reach the VMM", source))?;
        for request in list {
            let told = api.put(&request.path, &request.body).await;
            told.map_err(|source| (request.doing, source))?;
        }
        Ok(())
    };
    tokio::select! {
        biased;
        done = all => done,
        _ = process.wait_exit() => Err(("reach the VMM", ControlError::Closed)),
    }
}

/// Waits until its socket is there and answers.
async fn wait_for_socket(api: &Api) -> Result<(), ControlError> {
    let began = Instant::now();
    loop {
        match api.get("/").await {
            Err(ControlError::Connect { .. }) if began.elapsed() < api.patience => {
                tokio::time::sleep(LOOK).await;
            }
            answer => return answer.map(drop),
        }
    }
}

/// Why it did not start, in its own words. Ends it first, so that it has no more of them.
async fn failure(
    plan: &LaunchPlan,
    words: &[&Words],
    process: &PidFd,
    doing: &'static str,
    source: ControlError,
) -> LaunchError {
    if let ControlError::Refused { said } = source {
        let (_, words) = take_back(plan, process, words).await;
        tracing::debug!(vm = %plan.vm, words, "a VMM refused");
        return LaunchError::Refused {
            doing,
            said,
            log: plan.log.clone(),
        };
    }
    let (ended, said) = take_back(plan, process, words).await;
    let log = plan.log.clone();
    match ended {
        Some(exit) => LaunchError::Exited { exit, said, log },
        None => LaunchError::Control {
            said,
            log,
            source: MachineError::Control { doing, source },
        },
    }
}

/// Why it did not take a saved guest, in its own words. Ends it first.
async fn restore_failure(
    plan: &LaunchPlan,
    words: &[&Words],
    process: &PidFd,
    doing: &'static str,
    source: ControlError,
) -> LaunchError {
    let (_, said) = take_back(plan, process, words).await;
    LaunchError::Restore {
        said,
        log: plan.log.clone(),
        source: MachineError::Control { doing, source },
    }
}

/// What an end that nobody asked for means. It ends with 0 when its guest resets, which is the only way to end that a guest
/// has here.
pub(super) fn ended_by_itself(exit: Option<Exit>, said_goodbye: bool) -> bool {
    match exit {
        Some(Exit::Code(0)) => true,
        Some(_) => false,
        // Not our child: nobody knows its status, but a kernel says that it ends.
        None => said_goodbye,
    }
}
