//! Starting QEMU and finding it again.
//!
//! ```text
//! validate ─► command line ─► bind sockets ─► spawn ─► machine.json ─► QMP answers ─► Machine
//!    pure         pure          └──────── a guard undoes these when a later step fails ────┘
//! ```

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use offshoot_sys::process::{DetachedCommand, InheritedFd, PidFd, Signal, share_fd, spawn_detached};
use serde_json::json;
use tokio::sync::OnceCell;

use super::args::{AGENT_FD, FIRST_TAP_FD, MEMORY_FD, QMP_FD, STATE_FD, command_line};
use super::machine::QemuMachine;
use super::probe::{QemuFacts, probe};
use super::qmp::{Migration, Qmp};
use super::shape::shape;
use crate::driver::{Driver, LaunchError, ProbeError, ReopenError, VmmFacts};
use crate::machine::{AgentEndpoint, ControlError, Machine, MachineError, MachineState};
use crate::plan::{LaunchPlan, NetBackend, Origin, PlanError};
use crate::process::{self, Program, Taps, Ways};
use crate::words::Words;

/// The name of this driver in stored states.
pub(crate) const KIND: &str = "qemu";

/// It does without io_uring, and is then spared the largest interface to the host's kernel that it would have.
const WAYS: Ways = Ways {
    taps: Taps::Open,
    io_uring: false,
};

/// Which QEMU, and how it is run.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its environment, whole. QEMU needs none.
    pub env: Vec<(String, String)>,
    /// Files and folders that it reads besides itself, `/usr` and `/lib`: what it was linked against elsewhere.
    pub files: Vec<PathBuf>,
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
            files: Vec::new(),
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
            disks: Default::default(),
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
        if matches!(plan.origin, Origin::Template(_))
            && let Err(source) = restore(&qmp, &pidfd).await
        {
            return Err(restore_failure(plan, &words, &pidfd, source).await);
        }
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
    let program = Program {
        path: &config.program,
        env: &config.env,
        files: &config.files,
    };
    let mut command = process::command(program, args, plan, WAYS, Vec::new());
    let output = words.writer().map_err(|source| LaunchError::Prepare {
        path: plan.log.clone(),
        source,
    })?;
    command.output = Some(output);
    for (path, number) in [(&launched.control, QMP_FD), (&launched.agent, AGENT_FD)] {
        let fd = listen(path).map_err(|source| LaunchError::Prepare {
            path: path.clone(),
            source,
        })?;
        command.inherit.push(InheritedFd { fd, number });
    }
    let saved = |source| LaunchError::Prepare {
        path: "/proc/self/fd".into(),
        source,
    };
    match &plan.origin {
        Origin::Kernel => {}
        Origin::KernelInto(memory) => {
            let fd = share_fd(&**memory).map_err(saved)?;
            command.inherit.push(InheritedFd {
                fd,
                number: MEMORY_FD,
            });
        }
        Origin::Template(guest) => {
            let fd = share_fd(&*guest.memory).map_err(saved)?;
            command.inherit.push(InheritedFd {
                fd,
                number: MEMORY_FD,
            });
            // Each reads it from its start: a copy of the descriptor would have its position in common with the others.
            let again = format!("/proc/self/fd/{}", guest.state.as_raw_fd());
            let fd = std::fs::File::open(again).map_err(saved)?.into();
            command.inherit.push(InheritedFd { fd, number: STATE_FD });
        }
    }
    for (net, number) in plan.nets.iter().zip(FIRST_TAP_FD..) {
        if let NetBackend::TapFd(tap) = &net.backend {
            let fd = tap.take().ok_or(LaunchError::NoTap { mac: net.mac })?;
            command.inherit.push(InheritedFd { fd, number });
        }
    }
    Ok((launched, command))
}

/// Lets a QEMU that waits for it take over the saved guest; it then stands.
async fn restore(qmp: &Qmp, process: &PidFd) -> Result<(), MachineError> {
    let doing = "restore the VM";
    let take = async {
        qmp.prepare_migration().await?;
        let from = json!({"uri": format!("fd:{STATE_FD}")});
        qmp.execute("migrate-incoming", from).await?;
        qmp.migrated().await
    };
    let taken = tokio::select! {
        biased;
        taken = take => taken,
        _ = process.wait_exit() => Err(ControlError::Closed),
    };
    match taken {
        Ok(Migration::Completed) => Ok(()),
        Ok(Migration::Failed) => Err(MachineError::Migration { doing }),
        Err(source) => Err(MachineError::Control { doing, source }),
    }
}

/// Why QEMU did not take a saved guest, in its own words. Ends it first.
async fn restore_failure(
    plan: &LaunchPlan,
    words: &Words,
    process: &PidFd,
    source: MachineError,
) -> LaunchError {
    if tokio::time::timeout(LEAVING, process.wait_exit()).await.is_err() {
        let _ = process.send_signal(Signal::KILL);
        process.wait_exit().await;
    }
    if let Err(error) = words.save(&plan.log) {
        tracing::warn!(vm = %plan.vm, %error, "cannot keep what QEMU said");
    }
    LaunchError::Restore {
        said: said(&words.said()),
        log: plan.log.clone(),
        source,
    }
}

/// A listening socket in place of whatever an earlier run left there.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    Ok(UnixListener::bind(path)?.into())
}

/// How long a QEMU that complains may take to be gone.
const LEAVING: Duration = Duration::from_millis(500);

/// Why QEMU did not answer, in its own words. Ends it first, so that it has no more of them.
async fn failure(plan: &LaunchPlan, words: &Words, process: &PidFd, source: ControlError) -> LaunchError {
    // A QEMU that complains closes its sockets a moment before it is gone; its status then says more than ours.
    let ended_by_itself = tokio::time::timeout(LEAVING, process.wait_exit()).await;
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
