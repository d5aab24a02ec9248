//! What Cloud Hypervisor's and Firecracker's machines have in common: a process that ends with its guest, its words, its
//! console, a folder for its sockets, and one task that sees its end.
//!
//! ```text
//! <run>/vms/<id>/            ours
//!     own/                   the VMM's: sockets that it makes itself
//! running ─ guest ends, quit(), kill(), crash ─► process gone ─► words and console saved, files removed ─► wait_exit returns
//! ```

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use offshoot_sys::process::{Exit, PidFd, Signal};
use tokio::sync::watch;

use crate::console::{Console, tail_of_log};
use crate::machine::{ControlError, ExitCause, MachineError, MachineState, VmmExit};
use crate::plan::LaunchPlan;
use crate::words::Words;

/// How long a killed process may take to go: the kernel frees its memory.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// How long a VMM that has closed its sockets may take to be gone.
const LEAVING: Duration = Duration::from_millis(500);
/// How long the last of the console may take.
const CONSOLE_PATIENCE: Duration = Duration::from_millis(200);

/// The folder in a run folder that belongs to the VMM.
pub(crate) fn own_folder(run_dir: &Path) -> PathBuf {
    run_dir.join("own")
}

/// Makes the VMM's own folder anew: what an earlier run left there would be in its way.
pub(crate) fn make_own_folder(plan: &LaunchPlan) -> io::Result<PathBuf> {
    let folder = own_folder(&plan.run_dir);
    remove_folder(&folder)?;
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    if let Some(who) = &plan.identity {
        chown(&folder, Some(who.uid), Some(who.gid))?;
    }
    Ok(folder)
}

/// Removes the VMM's own folder, where there is one.
pub(crate) fn remove_folder(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One process with what is kept of it.
pub(crate) struct Tended {
    pub(crate) state: MachineState,
    pub(crate) process: PidFd,
    /// What it says; nothing where that cannot be reached.
    words: Vec<Words>,
    /// The guest's console; nothing where that cannot be reached.
    pub(crate) console: Option<Console>,
    kill_asked: AtomicBool,
    quit_asked: AtomicBool,
    exit: watch::Sender<Option<VmmExit>>,
}

impl Tended {
    pub(crate) fn new(
        state: MachineState,
        process: PidFd,
        words: Vec<Words>,
        console: Option<Console>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state,
            process,
            words,
            console,
            kill_asked: AtomicBool::new(false),
            quit_asked: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        })
    }

    /// Sees the end of a process that is gone or about to go. `by_itself` tells the cause where nobody asked for the end.
    pub(crate) async fn see_off(&self, by_itself: impl AsyncFnOnce(Option<Exit>) -> ExitCause) {
        let process = self.process.wait_exit().await;
        if let Some(console) = &self.console
            && let Err(error) = console.save().await
        {
            tracing::warn!(vm = %self.state.vm, %error, "cannot keep the last of the console");
        }
        let cause = if self.kill_asked.load(Ordering::Relaxed) {
            ExitCause::Killed
        } else if self.quit_asked.load(Ordering::Relaxed) {
            ExitCause::Quit
        } else {
            by_itself(process).await
        };
        tracing::debug!(vm = %self.state.vm, %cause, ?process, "{} is gone", self.state.driver);
        for words in &self.words {
            if let Err(error) = words.save(&self.state.log) {
                tracing::warn!(vm = %self.state.vm, %error, "cannot keep what a VMM said");
            }
        }
        self.remove_files();
        self.exit.send_replace(Some(VmmExit { cause, process }));
    }

    /// From here on, its end is what was asked for.
    pub(crate) fn note_quit(&self) {
        self.quit_asked.store(true, Ordering::Relaxed);
    }

    fn remove_files(&self) {
        remove_files(&self.state);
    }

    /// An error of the connection, or that the process is gone where that is why. A VMM that leaves closes its sockets a
    /// moment before.
    pub(crate) async fn control(&self, doing: &'static str, source: ControlError) -> MachineError {
        let gone = match &source {
            ControlError::Connect { .. } | ControlError::Io { .. } | ControlError::Closed => {
                tokio::time::timeout(LEAVING, self.process.wait_exit())
                    .await
                    .is_ok()
            }
            _ => !self.process.is_alive(),
        };
        if gone {
            MachineError::Gone
        } else {
            MachineError::Control { doing, source }
        }
    }

    /// Ends it by force, and waits for that.
    pub(crate) async fn kill(&self) -> Result<(), MachineError> {
        self.kill_asked.store(true, Ordering::Relaxed);
        self.signal_to_end().await
    }

    /// The same, with whatever was asked for before as its cause.
    pub(crate) async fn signal_to_end(&self) -> Result<(), MachineError> {
        let pid = self.state.process.pid;
        self.process
            .send_signal(Signal::KILL)
            .map_err(|source| MachineError::Kill { pid, source })?;
        self.gone(KILL_PATIENCE).await
    }

    /// Waits until nothing of the process is left.
    pub(crate) async fn gone(&self, limit: Duration) -> Result<(), MachineError> {
        let pid = self.state.process.pid;
        tokio::time::timeout(limit, self.exited())
            .await
            .map(drop)
            .map_err(|_| MachineError::StillThere { pid, limit })
    }

    pub(crate) async fn exited(&self) -> VmmExit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`, so waiting cannot fail; the value is there when it returns.
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.unwrap_or(VmmExit {
            cause: ExitCause::Died,
            process: None,
        })
    }

    pub(crate) async fn console_tail(&self, limit: usize) -> Result<Vec<u8>, MachineError> {
        let tail = match &self.console {
            Some(console) => tokio::time::timeout(10 * CONSOLE_PATIENCE, console.tail(limit))
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
            None => tail_of_log(&self.state.console, limit).await,
        };
        tail.map_err(|source| MachineError::Console {
            path: self.state.console.clone(),
            source,
        })
    }
}

/// Removes what a process that is gone has left in its run folder.
pub(crate) fn remove_files(state: &MachineState) {
    state.remove_files();
    let folder = own_folder(&state.run_dir);
    if let Err(error) = remove_folder(&folder) {
        tracing::warn!(vm = %state.vm, %error, "cannot remove the folder of a VMM that is gone");
    }
}

/// What a launch has made so far. Dropped, it takes all of it back.
pub(crate) struct Launched {
    pub(crate) run_dir: PathBuf,
    /// A socket of ours in the run folder, where there is one.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) process: Option<PidFd>,
    kept: bool,
}

impl Launched {
    pub(crate) fn new(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            socket: None,
            process: None,
            kept: false,
        }
    }

    pub(crate) fn keep(mut self) {
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
        let record = self.run_dir.join(MachineState::FILE);
        for path in self.socket.iter().chain([&record]) {
            // It may not have been made.
            let _ = std::fs::remove_file(path);
        }
        if let Err(error) = remove_folder(&own_folder(&self.run_dir)) {
            tracing::warn!(%error, "cannot remove the folder of a VMM whose launch failed");
        }
    }
}

/// Lets a process that complains leave by itself, ends one that does not, and keeps its words. Gives how it ended where it
/// did so by itself.
pub(crate) async fn take_back(
    plan: &LaunchPlan,
    process: &PidFd,
    words: &[&Words],
) -> (Option<Option<Exit>>, String) {
    let ended_by_itself = tokio::time::timeout(LEAVING, process.wait_exit()).await.ok();
    if ended_by_itself.is_none() {
        let _ = process.send_signal(Signal::KILL);
        process.wait_exit().await;
    }
    let mut said = Vec::new();
    for words in words {
        said.extend(words.said());
        if let Err(error) = words.save(&plan.log) {
            tracing::warn!(vm = %plan.vm, %error, "cannot keep what a VMM said");
        }
    }
    (ended_by_itself, said.join("; "))
}
