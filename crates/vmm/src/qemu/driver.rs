//! Starting QEMU and finding it again.
//!
//! ```text
//! validate ─► command line ─► bind sockets ─► spawn ─► machine.json ─► QMP answers ─► Machine
//!    pure         pure          └──────── a guard undoes these when a later step fails ────┘
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use offshoot_sys::process::{
    DetachedCommand, Identity, InheritedFd, PidFd, ResourceLimit, Signal, spawn_detached,
};
use tokio::sync::OnceCell;

use super::args::{AGENT_FD, FIRST_TAP_FD, QMP_FD, command_line};
use super::machine::QemuMachine;
use super::probe::{QemuFacts, probe};
use super::qmp::Qmp;
use crate::driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts};
use crate::machine::{AgentEndpoint, ControlError, Machine, MachineError, MachineState};
use crate::plan::{LaunchPlan, NetBackend, PlanError};
use crate::words::Words;

/// The name of this driver in stored states.
pub(crate) const KIND: &str = "qemu";

/// Which QEMU, and how it is run.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its environment, whole. QEMU needs none.
    pub env: Vec<(String, String)>,
    /// How long it may take to answer a command.
    pub patience: Duration,
}

impl Default for QemuConfig {
    /// Where Debian puts it, with nothing in its environment. A healthy QEMU answers within a millisecond; one that
    /// waits for a slow disk holds its main loop for seconds.
    fn default() -> Self {
        Self {
            program: "/usr/bin/qemu-system-x86_64".into(),
            env: Vec::new(),
            patience: Duration::from_secs(10),
        }
    }
}

/// The driver of QEMU.
#[derive(Debug)]
pub struct QemuDriver {
    config: QemuConfig,
    facts: OnceCell<QemuFacts>,
}

impl QemuDriver {
    /// A driver that has not looked at its program yet.
    pub fn new(config: QemuConfig) -> Self {
        Self {
            config,
            facts: OnceCell::new(),
        }
    }

    /// What this QEMU can do; asked once.
    pub async fn facts(&self) -> Result<&QemuFacts, ProbeError> {
        self.facts
            .get_or_try_init(|| probe(&self.config.program, &self.config.env))
            .await
    }
}

#[async_trait]
impl Driver for QemuDriver {
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
                    what: error.option,
                    path: error.value.into(),
                },
            })?;
        let started = Instant::now();
        let words = Words::new("vmm-words").map_err(|source| LaunchError::Prepare {
            path: plan.log.clone(),
            source,
        })?;
        let (mut launched, command) = prepare(plan, &self.config, args, &words)?;

        let (process, pidfd) = spawn_detached(command).map_err(|source| LaunchError::Spawn { source })?;
        launched.process = Some(pidfd.clone());
        let state = MachineState {
            driver: KIND.into(),
            vm: plan.vm.clone(),
            process,
            run_dir: plan.run_dir.clone(),
            control: launched.control.clone(),
            agent: AgentEndpoint::UnixLink(launched.agent.clone()),
            console: plan.console.clone(),
            log: plan.log.clone(),
        };
        let record = plan.run_dir.join(MachineState::FILE);
        state
            .save()
            .map_err(|source| LaunchError::Prepare { path: record, source })?;
        let spawned = started.elapsed();

        let qmp = tokio::select! {
            biased;
            qmp = Qmp::connect(&state.control, self.config.patience) => qmp,
            _ = pidfd.wait_exit() => Err(ControlError::Closed),
        };
        let qmp = match qmp {
            Ok(qmp) => qmp,
            Err(source) => return Err(failure(plan, &words, &pidfd, source).await),
        };
        tracing::debug!(vm = %plan.vm, pid = state.process.pid, ?spawned, ready = ?started.elapsed(), "QEMU answers");
        launched.keep();
        Ok(Box::new(QemuMachine::start(
            state,
            pidfd,
            Some(words),
            qmp,
            self.config.patience,
        )))
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
            state.remove_files();
            return Ok(None);
        };
        let qmp = tokio::select! {
            biased;
            qmp = Qmp::connect(&state.control, self.config.patience) => qmp,
            _ = pidfd.wait_exit() => {
                state.remove_files();
                return Ok(None);
            }
        };
        match qmp {
            Ok(qmp) => Ok(Some(Box::new(QemuMachine::start(
                state.clone(),
                pidfd,
                words_of(state),
                qmp,
                self.config.patience,
            )))),
            Err(source) => {
                let source = MachineError::Control {
                    doing: "take over the VMM",
                    source,
                };
                Err(ReopenError::Control { pid, source })
            }
        }
    }
}

/// What a launch has made so far. Dropped, it takes all of it back.
struct Launched {
    run_dir: PathBuf,
    control: PathBuf,
    agent: PathBuf,
    process: Option<PidFd>,
    kept: bool,
}

impl Launched {
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Some(process) = &self.process
            && let Err(error) = process.send_signal(Signal::KILL)
        {
            tracing::warn!(%error, "cannot kill a VMM whose launch failed");
        }
        for path in [&self.control, &self.agent, &self.run_dir.join(MachineState::FILE)] {
            // It may not have been made.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes the sockets and the command that inherits them.
fn prepare(
    plan: &LaunchPlan,
    config: &QemuConfig,
    args: Vec<std::ffi::OsString>,
    words: &Words,
) -> Result<(Launched, DetachedCommand), LaunchError> {
    let launched = Launched {
        run_dir: plan.run_dir.clone(),
        control: plan.run_dir.join("qmp.sock"),
        agent: plan.run_dir.join("agent.sock"),
        process: None,
        kept: false,
    };
    let mut command = DetachedCommand::new(&config.program);
    command.args = args;
    command.env = config
        .env
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    let output = words.writer().map_err(|source| LaunchError::Prepare {
        path: plan.log.clone(),
        source,
    })?;
    command.output = Some(output);
    command.identity = plan.identity.clone().map(|who| Identity {
        uid: who.uid,
        gid: who.gid,
        groups: who.groups,
    });
    command.cgroups.clone_from(&plan.cgroups);
    // A dump of QEMU is a dump of the guest's memory.
    command.limits = vec![ResourceLimit::Core(0)];
    for (path, number) in [(&launched.control, QMP_FD), (&launched.agent, AGENT_FD)] {
        let fd = listen(path).map_err(|source| LaunchError::Prepare {
            path: path.clone(),
            source,
        })?;
        command.inherit.push(InheritedFd { fd, number });
    }
    for (net, number) in plan.nets.iter().zip(FIRST_TAP_FD..) {
        if let NetBackend::TapFd(tap) = &net.backend {
            let fd = tap.take().ok_or(LaunchError::NoTap { mac: net.mac })?;
            command.inherit.push(InheritedFd { fd, number });
        }
    }
    Ok((launched, command))
}

/// A listening socket in place of whatever an earlier run left there.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    Ok(UnixListener::bind(path)?.into())
}

/// Why QEMU did not answer, in its own words. Ends it first, so that it has no more of them.
async fn failure(plan: &LaunchPlan, words: &Words, process: &PidFd, source: ControlError) -> LaunchError {
    // A QEMU that complains closes its sockets a moment before it is gone; its status then says more than ours.
    let leaving = Duration::from_millis(500);
    let ended_by_itself = tokio::time::timeout(leaving, process.wait_exit()).await;
    if ended_by_itself.is_err() {
        let _ = process.send_signal(Signal::KILL);
        process.wait_exit().await;
    }
    if let Err(error) = words.save(&plan.log) {
        tracing::warn!(vm = %plan.vm, %error, "cannot keep what QEMU said");
    }
    let (said, log) = (said(&words.said()), plan.log.clone());
    match ended_by_itself {
        Ok(exit) => LaunchError::Exited { exit, said, log },
        Err(_) => LaunchError::Control {
            said,
            log,
            source: MachineError::Control {
                doing: "take over the VMM",
                source,
            },
        },
    }
}

/// What a QEMU of an earlier daemon says.
fn words_of(state: &MachineState) -> Option<Words> {
    let words = Words::of_process(state.process.pid);
    words
        .inspect_err(|error| tracing::warn!(vm = %state.vm, %error, "cannot reach what QEMU says"))
        .ok()
}

/// QEMU's last words in one line.
fn said(lines: &[String]) -> String {
    let lines = lines.iter().map(|line| without_timestamp(line));
    lines.collect::<Vec<_>>().join("; ")
}

/// `2026-11-21T20:57:00.123456Z qemu-system-x86_64: words` without the time: the error is about now.
fn without_timestamp(line: &str) -> &str {
    match line.split_once("Z ") {
        Some((time, rest)) if time.len() == 26 && time.starts_with(|c: char| c.is_ascii_digit()) => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_words_lose_their_time() {
        let lines = [
            "2026-11-21T20:57:00.123456Z qemu: cannot x".to_owned(),
            "second".to_owned(),
        ];
        assert_eq!(said(&lines), "qemu: cannot x; second");
        assert_eq!(said(&[]), "");
    }
}
