//! Starting Cloud Hypervisor and finding it again.
//!
//! ```text
//! validate ─► command line ─► sockets, pipes ─► spawn ─► machine.json ─► it says "booted" ─► its API answers ─► Machine
//!    pure         pure           └──────── a guard undoes these when a later step fails ────────┘
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use offshoot_sys::process::{DetachedCommand, InheritedFd, PidFd, spawn_detached};
use tokio::sync::OnceCell;

use super::args::{API_FD, EVENTS_FD, FIRST_TAP_FD, agent_socket, command_line};
use super::events::{Events, Seen};
use super::machine::CloudHypervisorMachine;
use super::probe::CloudHypervisorFacts;
use crate::ask::ask;
use crate::console::{Console, pipe_of_process, pipe_that_lasts};
use crate::driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts};
use crate::http::Api;
use crate::machine::{AgentEndpoint, ControlError, Machine, MachineError, MachineState};
use crate::plan::{AgentChannel, LaunchPlan, NetBackend, PlanError};
use crate::process;
use crate::tended::{Launched, Tended, make_own_folder, own_folder, remove_files, take_back};
use crate::words::Words;

/// The name of this driver in stored states.
pub(crate) const KIND: &str = "cloud-hypervisor";

/// Which Cloud Hypervisor, and how it is run.
#[derive(Clone, Debug)]
pub struct CloudHypervisorConfig {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its environment, whole. It needs none.
    pub env: Vec<(String, String)>,
    /// How long it may take to answer a request, and to boot.
    pub patience: Duration,
}

impl CloudHypervisorConfig {
    /// One at `program`. A healthy one answers within some milliseconds, and boots within a second.
    pub fn at(program: PathBuf) -> Self {
        Self {
            program,
            env: Vec::new(),
            patience: Duration::from_secs(10),
        }
    }
}

/// The driver of Cloud Hypervisor.
#[derive(Debug)]
pub struct CloudHypervisorDriver {
    config: CloudHypervisorConfig,
    facts: OnceCell<CloudHypervisorFacts>,
}

impl CloudHypervisorDriver {
    /// A driver that has not looked at its program yet.
    pub fn new(config: CloudHypervisorConfig) -> Self {
        Self {
            config,
            facts: OnceCell::new(),
        }
    }

    /// What this Cloud Hypervisor can do; asked once.
    pub async fn facts(&self) -> Result<&CloudHypervisorFacts, ProbeError> {
        let asked = async {
            let program = &self.config.program;
            let said = ask(program, KIND, &self.config.env, &["--version"]).await?;
            CloudHypervisorFacts::read(program, &said)
        };
        self.facts.get_or_try_init(|| asked).await
    }

    fn api(&self, run_dir: &Path) -> Api {
        Api {
            socket: run_dir.join("api.sock"),
            prefix: "/api/v1",
            // We bound it, in a folder of ours.
            maker: None,
            patience: self.config.patience,
        }
    }

    fn command(&self, plan: &LaunchPlan, args: Vec<std::ffi::OsString>) -> DetachedCommand {
        process::command(&self.config.program, args, &self.config.env, plan)
    }
}

#[async_trait]
impl Driver for CloudHypervisorDriver {
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
        let args = command_line(plan, facts)?
            .encode()
            .map_err(|error| LaunchError::Plan {
                source: PlanError::Path {
                    what: error.flag,
                    path: error.value.into(),
                },
            })?;
        look_for_shares(plan)?;
        let started = Instant::now();
        let prepare = |path: &Path| {
            let path = path.to_owned();
            |source| LaunchError::Prepare { path, source }
        };
        let words = Words::new("vmm-words").map_err(prepare(&plan.log))?;
        let (stdout, console) = pipe_that_lasts().map_err(prepare(&plan.console))?;
        let (events_in, events) = pipe_that_lasts().map_err(prepare(&plan.run_dir))?;
        let api = self.api(&plan.run_dir);

        let mut launched = Launched::new(&plan.run_dir);
        launched.socket = Some(api.socket.clone());
        make_own_folder(plan).map_err(prepare(&own_folder(&plan.run_dir)))?;
        let mut command = self.command(plan, args);
        command.stdout = Some(stdout);
        command.output = Some(words.writer().map_err(prepare(&plan.log))?);
        let listening = listen(&api.socket).map_err(prepare(&api.socket))?;
        for (fd, number) in [(listening, API_FD), (events_in, EVENTS_FD)] {
            command.inherit.push(InheritedFd { fd, number });
        }
        for (net, number) in plan.nets.iter().zip(FIRST_TAP_FD..) {
            if let NetBackend::TapFd(tap) = &net.backend {
                let fd = tap.take().ok_or(LaunchError::NoTap { mac: net.mac })?;
                command.inherit.push(InheritedFd { fd, number });
            }
        }

        let (process, pidfd) = spawn_detached(command).map_err(|source| LaunchError::Spawn { source })?;
        launched.process = Some(pidfd.clone());
        let port = match plan.agent {
            AgentChannel::HybridVsock { port, .. } => port,
            AgentChannel::VirtioSerial => 0,
        };
        let state = MachineState {
            driver: KIND.into(),
            vm: plan.vm.clone(),
            process,
            run_dir: plan.run_dir.clone(),
            control: api.socket.clone(),
            agent: AgentEndpoint::HybridVsock {
                path: agent_socket(plan),
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
        let events = Events::follow(events, Seen::default());
        let spawned = started.elapsed();
        if let Err(source) = boots(&api, &pidfd, &events).await {
            let (ended, said) = take_back(plan, &pidfd, &[&words]).await;
            let log = plan.log.clone();
            return Err(match ended {
                Some(exit) => LaunchError::Exited { exit, said, log },
                None => LaunchError::Control {
                    said,
                    log,
                    source: MachineError::Control {
                        doing: "take over the VMM",
                        source,
                    },
                },
            });
        }
        tracing::debug!(vm = %plan.vm, pid = state.process.pid, ?spawned, ready = ?started.elapsed(), "Cloud Hypervisor runs");
        launched.keep();
        let tended = Tended::new(state, pidfd, vec![words], Some(console));
        Ok(Box::new(CloudHypervisorMachine::start(tended, api, Some(events))))
    }

    async fn shape(&self, _: &LaunchPlan) -> Result<Option<String>, LaunchError> {
        Ok(None)
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
        let api = self.api(&state.run_dir);
        let answer = tokio::select! {
            biased;
            answer = api.get("/vmm.ping") => answer,
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
        let unreachable = |what: &'static str| move |error: &io::Error| tracing::warn!(vm = %state.vm, %error, "cannot reach {what}");
        let words = Words::of_process(pid)
            .inspect_err(unreachable("what a VMM says"))
            .ok();
        let console = pipe_of_process(pid, 1)
            .inspect_err(unreachable("a guest's console"))
            .ok()
            .map(|pipe| Console::start(pipe, state.console.clone()));
        let before = Seen {
            booted: true,
            ..Seen::default()
        };
        let events = pipe_of_process(pid, EVENTS_FD)
            .inspect_err(unreachable("a VMM's events"))
            .ok()
            .map(|pipe| Events::follow(pipe, before));
        let words = words.into_iter().collect();
        let tended = Tended::new(state.clone(), pidfd, words, console);
        Ok(Some(Box::new(CloudHypervisorMachine::start(tended, api, events))))
    }
}

/// Refuses a plan whose shares nobody serves: Cloud Hypervisor would try for a minute, and hear nothing meanwhile.
fn look_for_shares(plan: &LaunchPlan) -> Result<(), LaunchError> {
    for share in &plan.shares {
        let looked = std::fs::symlink_metadata(&share.socket).and_then(|meta| {
            if meta.file_type().is_socket() {
                Ok(())
            } else {
                Err(io::Error::other("it is not a socket"))
            }
        });
        looked.map_err(|source| LaunchError::NoShare {
            tag: share.tag.clone(),
            path: share.socket.clone(),
            source,
        })?;
    }
    Ok(())
}

/// A listening socket in place of whatever an earlier run left there.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    Ok(UnixListener::bind(path)?.into())
}

/// Returns when the guest's processors run and the API answers.
async fn boots(api: &Api, process: &PidFd, events: &Events) -> Result<(), ControlError> {
    let mut seen = events.seen.clone();
    let booted = async {
        if seen.wait_for(|seen| seen.booted).await.is_err() {
            // Whoever reads the events gave up.
            return Err(ControlError::Malformed {
                said: "its events are none".into(),
            });
        }
        api.get("/vmm.ping").await.map(drop)
    };
    tokio::select! {
        biased;
        booted = booted => booted,
        _ = process.wait_exit() => Err(ControlError::Closed),
        () = tokio::time::sleep(api.patience) => Err(ControlError::Timeout { limit: api.patience }),
    }
}
