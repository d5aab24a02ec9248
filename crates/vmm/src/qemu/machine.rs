//! One QEMU with its VM. A task per machine waits for its end, saves the guest's last words, and tidies up.
//!
//! ```text
//! running ─ SHUTDOWN event ─► save console ─► quit ─┐
//!    │                                              ├─► process gone ─► words saved, files removed ─► wait_exit returns
//!    └─ quit(), kill(), crash ──────────────────────┘
//! ```

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::ByteSize;
use offshoot_sys::process::{PidFd, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;

use super::args::{CONSOLE_CHARDEV, CONSOLE_RING, disk_node};
use super::qmp::{Migration, Qmp, Seen, Shutdown};
use crate::bounded_log;
use crate::machine::{
    ControlError, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots, VmmExit,
};
use crate::words::Words;

/// How long QEMU may take to leave after `quit`: it flushes disks.
const QUIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a killed process may take to go: the kernel frees its memory.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// How long saving the console may hold up an end that was asked for.
const CONSOLE_PATIENCE: Duration = Duration::from_millis(200);
/// How long the last events may take from a socket whose process is gone: they are there already.
const LAST_EVENTS: Duration = Duration::from_millis(200);
/// A panic's message, registers and trace take about 4 KiB.
const PANIC_WINDOW: usize = 8 << 10;
/// How long a QEMU that has closed its sockets may take to be gone.
const LEAVING: Duration = Duration::from_millis(500);
/// How long to wait before a broken control connection is made again.
const RECONNECT: Duration = Duration::from_secs(1);
/// How often it is tried whether there is room again for what the guest writes.
const ROOM_RETRY: Duration = Duration::from_secs(1);
/// How long QEMU may take to say what it saves, 1 MiB or so.
const SAVE_PATIENCE: Duration = Duration::from_secs(10);
/// A guest that still finds no room is halted again within this time: its writes are repeated at once.
const ROOM_FOUND: Duration = Duration::from_millis(500);

pub(crate) struct QemuMachine {
    shared: Arc<Shared>,
    _watcher: AbortOnDropHandle<()>,
}

struct Shared {
    state: MachineState,
    process: PidFd,
    /// What it says; nothing where that cannot be reached.
    words: Option<Words>,
    /// How long QEMU may take to answer.
    patience: Duration,
    qmp: Mutex<Arc<Qmp>>,
    /// One reader of the console ring at a time, or its pieces could reach the log in the wrong order.
    console: Mutex<()>,
    kill_asked: AtomicBool,
    quit_asked: AtomicBool,
    pause_asked: AtomicBool,
    waits_for_room: watch::Sender<bool>,
    exit: watch::Sender<Option<VmmExit>>,
}

impl QemuMachine {
    pub(crate) fn start(
        state: MachineState,
        process: PidFd,
        words: Option<Words>,
        qmp: Qmp,
        patience: Duration,
    ) -> Self {
        let shared = Arc::new(Shared {
            state,
            process,
            words,
            patience,
            qmp: Mutex::new(Arc::new(qmp)),
            console: Mutex::new(()),
            kill_asked: AtomicBool::new(false),
            quit_asked: AtomicBool::new(false),
            pause_asked: AtomicBool::new(false),
            waits_for_room: watch::Sender::new(false),
            exit: watch::Sender::new(None),
        });
        let watcher = tokio::spawn(watch_until_gone(Arc::clone(&shared)));
        Self {
            shared,
            _watcher: AbortOnDropHandle::new(watcher),
        }
    }
}

/// Waits for the end of the guest or of QEMU, whichever comes first, and sees it through.
async fn watch_until_gone(shared: Arc<Shared>) {
    let mut shutdown = None;
    while shutdown.is_none() && shared.process.is_alive() {
        match shared.connection().await {
            Ok(qmp) => {
                shutdown = tokio::select! {
                    shutdown = shared.watch_connection(&qmp) => shutdown,
                    never = shared.mind_room(&qmp) => match never {},
                }
            }
            Err(error) => {
                tracing::warn!(vm = %shared.state.vm, %error, "no control connection");
                let _ = tokio::time::timeout(RECONNECT, shared.process.wait_exit()).await;
            }
        }
    }
    if shared.process.is_alive() {
        shared.see_off(shutdown).await;
    }
    if shutdown == Some(Shutdown::GuestReset) && shared.console_tells_of_panic().await {
        shutdown = Some(Shutdown::GuestPanic);
    }
    let process = shared.process.wait_exit().await;
    let cause = match shutdown {
        Some(Shutdown::GuestPowerOff) => ExitCause::GuestPowerOff,
        Some(Shutdown::GuestReset) => ExitCause::GuestReset,
        Some(Shutdown::GuestPanic) => ExitCause::GuestPanic,
        _ if shared.kill_asked.load(Ordering::Relaxed) => ExitCause::Killed,
        _ if shared.quit_asked.load(Ordering::Relaxed) => ExitCause::Quit,
        Some(Shutdown::HostQuit | Shutdown::Host) | None => ExitCause::Died,
    };
    tracing::debug!(vm = %shared.state.vm, %cause, ?process, "QEMU is gone");
    if let Some(words) = &shared.words
        && let Err(error) = words.save(&shared.state.log)
    {
        tracing::warn!(vm = %shared.state.vm, %error, "cannot keep what QEMU said");
    }
    shared.state.remove_files();
    shared.exit.send_replace(Some(VmmExit { cause, process }));
}

impl Shared {
    /// The control connection, made again if the last one broke.
    async fn connection(&self) -> Result<Arc<Qmp>, MachineError> {
        let mut qmp = self.qmp.lock().await;
        if qmp.is_closed() {
            if !self.process.is_alive() {
                return Err(MachineError::Gone);
            }
            let again = tokio::select! {
                biased;
                _ = self.process.wait_exit() => return Err(MachineError::Gone),
                again = Qmp::connect(&self.state.control, self.patience) => again,
            };
            match again {
                Ok(again) => *qmp = Arc::new(again),
                Err(source) => return Err(self.control("connect to the VMM again", source).await),
            }
        }
        Ok(Arc::clone(&qmp))
    }

    /// Returns when the guest has ended, with how; or `None` when the connection or the process has.
    async fn watch_connection(&self, qmp: &Qmp) -> Option<Shutdown> {
        // The guest may have ended before anybody listened.
        match qmp.run_state().await.as_deref() {
            Ok("shutdown") => return Some(qmp.seen().borrow().shutdown.unwrap_or(Shutdown::GuestPowerOff)),
            Ok("guest-panicked") => return Some(Shutdown::GuestPanic),
            _ => {}
        }
        let mut seen = qmp.seen();
        let process_gone = async {
            self.process.wait_exit().await;
            tokio::time::sleep(LAST_EVENTS).await;
        };
        tokio::select! {
            biased;
            seen = seen.wait_for(|seen| seen.shutdown.is_some() || seen.closed) => {
                seen.ok().and_then(|seen| seen.shutdown)
            }
            () = process_gone => qmp.seen().borrow().shutdown,
        }
    }

    /// Lets a guest go on that QEMU halted because a disk found no room on the host (its `werror=enospc`), as soon as
    /// there is some. A guest that somebody paused meanwhile is left so.
    async fn mind_room(&self, qmp: &Qmp) -> Infallible {
        let mut seen = qmp.seen();
        let mut halts = 0;
        if qmp.run_state().await.is_ok_and(|state| state == "io-error") {
            self.waits_for_room.send_replace(true);
        }
        loop {
            if !*self.waits_for_room.borrow() {
                halts = next_halt(&mut seen, halts).await;
                tracing::warn!(vm = %self.state.vm, "the guest is halted: the host has no room for what it writes");
                self.waits_for_room.send_replace(true);
            }
            tokio::time::sleep(ROOM_RETRY).await;
            if self.pause_asked.load(Ordering::Relaxed) {
                continue;
            }
            halts = seen.borrow().halts;
            if let Err(error) = qmp.execute("cont", Value::Null).await {
                tracing::debug!(vm = %self.state.vm, %error, "the guest cannot go on yet");
                continue;
            }
            match tokio::time::timeout(ROOM_FOUND, next_halt(&mut seen, halts)).await {
                Ok(again) => halts = again,
                Err(_) => {
                    tracing::info!(vm = %self.state.vm, "there is room again, and the guest goes on");
                    self.waits_for_room.send_replace(false);
                }
            }
        }
    }

    /// Sees a QEMU off that has ended its guest: last words, quit, and by force if need be.
    async fn see_off(&self, shutdown: Option<Shutdown>) {
        // One that was told to quit is on its way; its console was saved before.
        if !matches!(shutdown, Some(Shutdown::HostQuit | Shutdown::Host)) {
            if let Err(error) = self.save_console().await {
                tracing::debug!(vm = %self.state.vm, %error, "cannot save the last of the console");
            }
            if let Err(error) = self.tell_to_quit().await {
                tracing::debug!(vm = %self.state.vm, %error, "cannot tell QEMU to quit");
            }
        }
        if tokio::time::timeout(QUIT_PATIENCE, self.process.wait_exit())
            .await
            .is_err()
        {
            tracing::warn!(vm = %self.state.vm, "QEMU does not quit; killing it");
            if let Err(error) = self.process.send_signal(Signal::KILL) {
                tracing::warn!(vm = %self.state.vm, %error, "cannot kill QEMU");
            }
        }
    }

    /// Whether the last words of the console are those of a kernel that panicked. It then asks for a reset, as one that
    /// was told to reboot does.
    async fn console_tells_of_panic(&self) -> bool {
        let path = self.state.console.clone();
        let tail = on_disk(self, move || bounded_log::tail(&path, PANIC_WINDOW)).await;
        tail.is_ok_and(|said| tells_of_panic(&said))
    }

    async fn execute(
        &self,
        doing: &'static str,
        command: &str,
        arguments: Value,
    ) -> Result<Value, MachineError> {
        let qmp = self.connection().await?;
        match qmp.execute(command, arguments).await {
            Ok(answer) => Ok(answer),
            Err(source) => Err(self.control(doing, source).await),
        }
    }

    /// An error of the connection, or that the process is gone where that is why. A QEMU that leaves closes its sockets
    /// a moment before.
    async fn control(&self, doing: &'static str, source: ControlError) -> MachineError {
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

    /// Sends `quit`. QEMU may be gone before it has answered.
    async fn tell_to_quit(&self) -> Result<(), MachineError> {
        let doing = "make the VMM quit";
        match self.connection().await {
            Ok(qmp) => match qmp.execute("quit", Value::Null).await {
                Ok(_) | Err(ControlError::Closed) => Ok(()),
                Err(source) => match self.control(doing, source).await {
                    MachineError::Gone => Ok(()),
                    error => Err(error),
                },
            },
            Err(MachineError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves what the ring holds to the console log.
    async fn save_console(&self) -> Result<(), MachineError> {
        let _turn = self.console.lock().await;
        let qmp = self.connection().await?;
        let said = match qmp.read_ring(CONSOLE_CHARDEV, CONSOLE_RING).await {
            Ok(said) => said,
            Err(source) => return Err(self.control("read the console", source).await),
        };
        if said.is_empty() {
            return Ok(());
        }
        let path = self.state.console.clone();
        on_disk(self, move || bounded_log::append(&path, &said)).await
    }

    /// Waits for the watcher to finish, so that nothing of the process is left.
    async fn gone(&self, limit: Duration) -> Result<VmmExit, MachineError> {
        let pid = self.state.process.pid;
        tokio::time::timeout(limit, self.exited())
            .await
            .map_err(|_| MachineError::StillThere { pid, limit })
    }

    async fn exited(&self) -> VmmExit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`, so waiting cannot fail; the value is there when it returns.
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.unwrap_or(VmmExit {
            cause: ExitCause::Died,
            process: None,
        })
    }
}

/// Waits until a guest was halted more than so many times, and says how many. For ever on a connection that is over.
async fn next_halt(seen: &mut watch::Receiver<Seen>, known: u64) -> u64 {
    match seen
        .wait_for(|seen| seen.halts > known)
        .await
        .map(|seen| seen.halts)
    {
        Ok(halts) => halts,
        Err(_) => std::future::pending().await,
    }
}

/// Whether a console ends in a panic (kernel, `kernel/panic.c`), which comes last but for a trace.
fn tells_of_panic(said: &[u8]) -> bool {
    let words = b"Kernel panic - not syncing";
    said.windows(words.len()).any(|window| window == words)
}

/// Reads or writes the console log off the runtime's threads.
async fn on_disk<T: Send + 'static>(
    shared: &Shared,
    act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, MachineError> {
    let done = tokio::task::spawn_blocking(act)
        .await
        .map_err(std::io::Error::from)
        .flatten();
    done.map_err(|source| MachineError::Console {
        path: shared.state.console.clone(),
        source,
    })
}

#[async_trait]
impl Machine for QemuMachine {
    fn state(&self) -> &MachineState {
        &self.shared.state
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        let qmp = self.shared.connection().await?;
        let state = match qmp.run_state().await {
            Ok(state) => state,
            Err(source) => return Err(self.shared.control("ask for the status", source).await),
        };
        status_of(&state).ok_or(MachineError::Control {
            doing: "ask for the status",
            source: ControlError::Malformed { said: state },
        })
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.shared.pause_asked.store(true, Ordering::Relaxed);
        self.shared
            .execute("pause the VM", "stop", Value::Null)
            .await
            .map(drop)
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.shared.pause_asked.store(false, Ordering::Relaxed);
        self.shared
            .execute("resume the VM", "cont", Value::Null)
            .await
            .map(drop)
    }

    async fn power_button(&self) -> Result<(), MachineError> {
        self.shared
            .execute("press the power button", "system_powerdown", Value::Null)
            .await
            .map(drop)
    }

    async fn quit(&self) -> Result<(), MachineError> {
        self.shared.quit_asked.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(CONSOLE_PATIENCE, self.shared.save_console()).await;
        self.shared.tell_to_quit().await?;
        self.shared.gone(QUIT_PATIENCE).await.map(drop)
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.shared.kill_asked.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(CONSOLE_PATIENCE, self.shared.save_console()).await;
        let pid = self.shared.state.process.pid;
        self.shared
            .process
            .send_signal(Signal::KILL)
            .map_err(|source| MachineError::Kill { pid, source })?;
        self.shared.gone(KILL_PATIENCE).await.map(drop)
    }

    async fn wait_exit(&self) -> VmmExit {
        self.shared.exited().await
    }

    fn waits_for_room(&self) -> watch::Receiver<bool> {
        self.shared.waits_for_room.subscribe()
    }

    async fn resize_disk(&self, serial: &str, size: ByteSize) -> Result<(), MachineError> {
        let doing = "grow a disk";
        let node = disk_node(serial);
        let qmp = self.shared.connection().await?;
        let now = match qmp.block_size(&node).await {
            Ok(now) => now,
            Err(source) => return Err(self.shared.control(doing, source).await),
        };
        let Some(now) = now else {
            return Err(MachineError::NoDisk {
                serial: serial.to_owned(),
            });
        };
        if now > size.bytes() {
            let from = ByteSize::from_bytes(now);
            return Err(MachineError::Shrink {
                serial: serial.to_owned(),
                from,
                to: size,
            });
        }
        let arguments = json!({"node-name": node, "size": size.bytes()});
        self.shared
            .execute(doing, "block_resize", arguments)
            .await
            .map(drop)
    }

    async fn console_tail(&self, limit: usize) -> Result<Vec<u8>, MachineError> {
        match self.shared.save_console().await {
            // The log still has what was saved before.
            Ok(()) | Err(MachineError::Gone) => {}
            Err(error) => return Err(error),
        }
        let path = self.shared.state.console.clone();
        on_disk(&self.shared, move || bounded_log::tail(&path, limit)).await
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

/// QEMU connects to a socket of ours and says there what it saves. It opens no file, and how much it says is limited.
#[async_trait]
impl Snapshots for QemuMachine {
    async fn save(&self, state: &Path, limit: ByteSize) -> Result<(), MachineError> {
        let doing = "save the VM";
        let shared = &self.shared;
        let socket = shared.state.run_dir.join("state.sock");
        let failed = |source| MachineError::Save {
            path: state.to_owned(),
            source,
        };
        let qmp = shared.connection().await?;
        let saved = async {
            let listener = listen_for(&socket).map_err(failed)?;
            let tell = async {
                qmp.prepare_migration().await?;
                let to = json!({"uri": format!("unix:{}", socket.display())});
                qmp.execute("migrate", to).await?;
                qmp.migrated().await
            };
            let hear = async {
                let (said, _) = listener.accept().await?;
                let mut file = tokio::fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(state)
                    .await?;
                let length = tokio::io::copy(&mut said.take(limit.bytes() + 1), &mut file).await?;
                file.flush().await?;
                if length > limit.bytes() {
                    return Err(std::io::Error::from(std::io::ErrorKind::FileTooLarge));
                }
                Ok(())
            };
            let (told, heard) = tokio::join!(tell, tokio::time::timeout(SAVE_PATIENCE, hear));
            match told {
                Ok(Migration::Completed) => {}
                Ok(Migration::Failed) => return Err(MachineError::Migration { doing }),
                Err(source) => return Err(shared.control(doing, source).await),
            }
            heard
                .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
                .map_err(failed)
        };
        let saved = saved.await;
        // It is gone with the run folder at the latest.
        let _ = std::fs::remove_file(&socket);
        saved
    }
}

/// A socket that the VMM may connect to: its group is that of the run folder.
fn listen_for(path: &Path) -> std::io::Result<tokio::net::UnixListener> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    let listener = tokio::net::UnixListener::bind(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    chown(path, None, Some(std::fs::metadata(folder)?.gid()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// QEMU's `RunState` in our words; `None` for one that there is not.
fn status_of(run_state: &str) -> Option<MachineStatus> {
    Some(match run_state {
        "prelaunch" | "inmigrate" => MachineStatus::Prepared,
        "running" => MachineStatus::Running,
        "shutdown" | "guest-panicked" => MachineStatus::Ended,
        "paused" | "suspended" | "debug" | "internal-error" | "io-error" | "watchdog" | "postmigrate"
        | "finish-migrate" | "restore-vm" | "save-vm" | "colo" => MachineStatus::Paused,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_a_reboot() {
        let panic = b"[    5.1] Kernel panic - not syncing: sysrq triggered crash\r\n[    5.2] CPU: 0 PID: 1";
        assert!(tells_of_panic(panic));
        assert!(!tells_of_panic(b"[    5.1] reboot: Restarting system\r\n"));
    }

    #[test]
    fn run_states_are_read() {
        for (word, expected) in [
            ("running", Some(MachineStatus::Running)),
            ("prelaunch", Some(MachineStatus::Prepared)),
            ("paused", Some(MachineStatus::Paused)),
            ("io-error", Some(MachineStatus::Paused)),
            ("shutdown", Some(MachineStatus::Ended)),
            ("guest-panicked", Some(MachineStatus::Ended)),
            ("dancing", None),
        ] {
            assert_eq!(status_of(word), expected, "{word}");
        }
    }
}
