//! Starting Cloud Hypervisor and finding it again.
//!
//! ```text
//! validate ─► command line ─► sockets, pipes ─► spawn ─► machine.json ─► it says "booted" ─► its API answers ─► Machine
//!    pure         pure           │                                       or "restored"  │
//!                                └──────── a guard undoes these when a later step fails ──────┘
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, FileTypeExt as _, OpenOptionsExt as _, PermissionsExt, fchown,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use offshoot_sys::process::{DetachedCommand, InheritedFd, PidFd, spawn_detached};
use offshoot_sys::tap;
use tokio::sync::OnceCell;

use super::args::{API_FD, EVENTS_FD, FIRST_TAP_FD, agent_socket, encoded, restore_folder, shape};
use super::events::{Events, Seen};
use super::machine::{CloudHypervisorMachine, SAVED, Saving};
use super::probe::CloudHypervisorFacts;
use super::saved::{CONFIG, STATE, config_of, unpacked};
use crate::ask::ask;
use crate::console::{Console, pipe_of_process, pipe_that_lasts};
use crate::driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts};
use crate::http::Api;
use crate::machine::{AgentEndpoint, ControlError, Machine, MachineError, MachineState};
use crate::plan::{AgentChannel, LaunchPlan, NetBackend, Origin, SavedGuest, VmmIdentity};
use crate::process::{self, Program, Taps, Ways};
use crate::saved::inherit;
use crate::tended::{Launched, Tended, make_own_folder, own_folder, remove_files, take_back};
use crate::words::Words;

/// The name of this driver in stored states.
pub(crate) const KIND: &str = "cloud-hypervisor";

/// It asks for the MTU of a TAP by its name, and reads and writes disks with io_uring where it can.
const WAYS: Ways = Ways {
    taps: Taps::OpenAndNamed,
    io_uring: true,
};

/// Which Cloud Hypervisor, and how it is run.
#[derive(Clone, Debug)]
pub struct CloudHypervisorConfig {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its environment, whole. It needs none.
    pub env: Vec<(String, String)>,
    /// Files and folders that it reads besides itself, `/usr` and `/lib`: what it was linked against elsewhere.
    pub files: Vec<PathBuf>,
    /// How long it may take to answer a request, and to boot.
    pub patience: Duration,
}

impl CloudHypervisorConfig {
    /// One at `program`. A healthy one answers within some milliseconds, and boots within a second.
    pub fn at(program: PathBuf) -> Self {
        Self {
            program,
            env: Vec::new(),
            files: Vec::new(),
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

    fn command(&self, plan: &LaunchPlan, args: Vec<OsString>, taps: Vec<String>) -> DetachedCommand {
        let program = Program {
            path: &self.config.program,
            env: &self.config.env,
            files: &self.config.files,
        };
        process::command(program, args, plan, WAYS, taps)
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
        let args = encoded(plan, facts)?;
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
        let own = make_own_folder(plan).map_err(prepare(&own_folder(&plan.run_dir)))?;
        let (taps, names) = take_taps(plan)?;
        let mut command = self.command(plan, args, names);
        command.inherit = taps;
        let saving = match &plan.origin {
            Origin::Kernel => None,
            Origin::KernelInto(memory) => Some(
                file_for_memory(plan, &own)
                    .map(|from| Saving {
                        from: Arc::new(from),
                        to: Arc::clone(memory),
                    })
                    .map_err(prepare(&own))?,
            ),
            Origin::Template(guest) => {
                lay_out(plan, guest).map_err(prepare(&restore_folder(plan)))?;
                None
            }
        };
        let origin = match &saving {
            Some(saving) => &Origin::KernelInto(Arc::clone(&saving.from)),
            None => &plan.origin,
        };
        inherit(origin, &mut command).map_err(prepare(Path::new("/proc/self/fd")))?;
        command.stdout = Some(stdout);
        command.output = Some(words.writer().map_err(prepare(&plan.log))?);
        let listening = listen(&api.socket).map_err(prepare(&api.socket))?;
        for (fd, number) in [(listening, API_FD), (events_in, EVENTS_FD)] {
            command.inherit.push(InheritedFd { fd, number });
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
                _ if matches!(plan.origin, Origin::Template(_)) => LaunchError::Restore {
                    said,
                    log,
                    source: MachineError::Control {
                        doing: "restore the VM",
                        source,
                    },
                },
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
        Ok(Box::new(CloudHypervisorMachine::start(
            tended,
            api,
            Some(events),
            saving,
        )))
    }

    async fn shape(&self, plan: &LaunchPlan) -> Result<Option<String>, LaunchError> {
        let facts = self
            .facts()
            .await
            .map_err(|source| LaunchError::Probe { source })?;
        shape(plan, facts)
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
        Ok(Some(Box::new(CloudHypervisorMachine::start(
            tended, api, events, None,
        ))))
    }
}

/// The open TAPs of a plan under the numbers that the command line names, and what they are called.
fn take_taps(plan: &LaunchPlan) -> Result<(Vec<InheritedFd>, Vec<String>), LaunchError> {
    let (mut taps, mut names) = (Vec::new(), Vec::new());
    for (net, number) in plan.nets.iter().zip(FIRST_TAP_FD..) {
        if let NetBackend::TapFd(slot) = &net.backend {
            let fd = slot.take().ok_or(LaunchError::NoTap { mac: net.mac })?;
            names.push(tap::name(&fd).map_err(|source| LaunchError::Prepare {
                path: "/dev/net/tun".into(),
                source,
            })?);
            taps.push(InheritedFd { fd, number });
        }
    }
    Ok((taps, names))
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

/// The memory of a VM that is to be saved: a file of the VMM's with a name, which is what tells Cloud Hypervisor that it need
/// not copy it. Beside it the folder for the rest.
fn file_for_memory(plan: &LaunchPlan, own: &Path) -> io::Result<File> {
    let give = |file: &File| match &plan.identity {
        Some(VmmIdentity { uid, gid, .. }) => fchown(file, Some(*uid), Some(*gid)),
        None => Ok(()),
    };
    let folder = own.join(SAVED);
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    give(&File::open(folder)?)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(own.join("memory"))?;
    memory.set_len(plan.memory.bytes())?;
    give(&memory)?;
    Ok(memory)
}

/// Writes what was saved, with the plan's own paths, to where Cloud Hypervisor reads it.
fn lay_out(plan: &LaunchPlan, guest: &SavedGuest) -> io::Result<()> {
    let folder = restore_folder(plan);
    let length = usize::try_from(guest.state.metadata()?.len()).map_err(io::Error::other)?;
    let mut saved = vec![0; length];
    guest.state.read_exact_at(&mut saved, 0)?;
    let (config, state) = unpacked(&saved)?;
    let config = config_of(plan, config)?;
    std::fs::DirBuilder::new().mode(0o755).create(&folder)?;
    let files = [(CONFIG, &*serde_json::to_vec(&config)?), (STATE, state)];
    for (name, text) in files {
        std::fs::write(folder.join(name), text)?;
        // The VMM reads it and is not its owner.
        std::fs::set_permissions(folder.join(name), PermissionsExt::from_mode(0o644))?;
    }
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755))
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
