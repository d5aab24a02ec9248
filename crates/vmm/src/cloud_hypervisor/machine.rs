//! One Cloud Hypervisor with its VM. A task per machine waits for its end, saves the guest's last words, and tidies up.
//!
//! ```text
//! running ─ the guest switches off: the process ends by itself ──────────┐
//!    ├───── it asks for a reset: an event says so, and we end the process ┼─► gone ─► wait_exit returns
//!    └───── quit(), kill(), crash ───────────────────────────────────────┘
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::ByteSize;
use offshoot_sys::process::{Exit, Signal};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::args::disk_id;
use super::events::{Events, Seen};
use super::requests::{ResizeDisk, Snapshot};
use super::saved::{CONFIG, MEMORY_COPY, STATE, packed};
use crate::grow::size_now;
use crate::http::Api;
use crate::machine::{
    ControlError, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots, VmmExit,
};
use crate::saved::{SAVE_PATIENCE, copy_memory, keep, on_disk, open_below};
use crate::tended::{Tended, own_folder};

/// How long it may take to leave after `vmm.shutdown`: it flushes disks.
const QUIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last events may take from a process that is gone: they are there already.
const LAST_EVENTS: Duration = Duration::from_millis(200);

pub(crate) struct CloudHypervisorMachine {
    tended: Arc<Tended>,
    api: Api,
    saving: Option<Saving>,
    _watcher: AbortOnDropHandle<()>,
}

/// What a VM has that is to be saved.
#[derive(Clone)]
pub(crate) struct Saving {
    /// Its memory, a file with a name.
    pub(crate) from: Arc<File>,
    /// Where that goes.
    pub(crate) to: Arc<File>,
}

/// The folder in its own folder in which it writes what it saves.
pub(super) const SAVED: &str = "saved";

impl CloudHypervisorMachine {
    pub(crate) fn start(
        tended: Arc<Tended>,
        api: Api,
        events: Option<Events>,
        saving: Option<Saving>,
    ) -> Self {
        let watcher = tokio::spawn(watch_until_gone(Arc::clone(&tended), events));
        Self {
            tended,
            api,
            saving,
            _watcher: AbortOnDropHandle::new(watcher),
        }
    }

    async fn tell(&self, doing: &'static str, path: &str) -> Result<(), MachineError> {
        let answer = self.api.put_nothing(path).await;
        self.told(doing, answer).await
    }

    async fn told(
        &self,
        doing: &'static str,
        answer: Result<Value, ControlError>,
    ) -> Result<(), MachineError> {
        match answer {
            Ok(_) => Ok(()),
            Err(source) => Err(self.tended.control(doing, source).await),
        }
    }
}

async fn watch_until_gone(tended: Arc<Tended>, events: Option<Events>) {
    let seen = events.as_ref().map(|events| events.seen.clone());
    let mut watched = seen.clone();
    let reset = async {
        if let Some(seen) = &mut watched
            && seen.wait_for(|seen| seen.reset).await.is_ok()
        {
            return;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        _ = tended.process.wait_exit() => {}
        // The guest must not come up again: nobody would tell it who it is.
        () = reset => {
            if let Err(error) = tended.process.send_signal(Signal::KILL) {
                tracing::warn!(vm = %tended.state.vm, %error, "cannot end a VMM whose guest asked for a reset");
            }
        }
    }
    let by_itself = async |exit: Option<Exit>| {
        let seen = last_seen(seen).await;
        let off = exit.is_none_or(|exit| exit == Exit::Code(0));
        let panicked = match &tended.console {
            Some(console) => console.tells_of_panic().await,
            None => false,
        };
        match (seen.reset, seen.off && off) {
            (true, _) if panicked => ExitCause::GuestPanic,
            (true, _) => ExitCause::GuestReset,
            (_, true) => ExitCause::GuestPowerOff,
            _ => ExitCause::Died,
        }
    };
    tended.see_off(by_itself).await;
}

/// What a process that is gone has said.
async fn last_seen(seen: Option<watch::Receiver<Seen>>) -> Seen {
    let Some(mut seen) = seen else {
        return Seen::default();
    };
    let ended = seen.wait_for(|seen| seen.reset || seen.off);
    let _ = tokio::time::timeout(LAST_EVENTS, ended).await;
    *seen.borrow()
}

#[async_trait]
impl Machine for CloudHypervisorMachine {
    fn state(&self) -> &MachineState {
        &self.tended.state
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        let doing = "ask for the status";
        let answer = match self.api.get("/vm.info").await {
            Ok(answer) => answer,
            Err(source) => return Err(self.tended.control(doing, source).await),
        };
        let said = answer["state"].as_str().unwrap_or_default().to_owned();
        status_of(&said).ok_or(MachineError::Control {
            doing,
            source: ControlError::Malformed { said },
        })
    }

    async fn pause(&self) -> Result<(), MachineError> {
        // It refuses to pause what is paused.
        if self.status().await? == MachineStatus::Paused {
            return Ok(());
        }
        self.tell("pause the VM", "/vm.pause").await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        if self.status().await? == MachineStatus::Running {
            return Ok(());
        }
        self.tell("resume the VM", "/vm.resume").await
    }

    async fn power_button(&self) -> Result<(), MachineError> {
        self.tell("press the power button", "/vm.power-button").await
    }

    async fn quit(&self) -> Result<(), MachineError> {
        self.tended.note_quit();
        let told = self.tell("make the VMM quit", "/vmm.shutdown").await;
        match told {
            Ok(()) | Err(MachineError::Gone) => self.tended.gone(QUIT_PATIENCE).await,
            Err(error) => Err(error),
        }
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.tended.kill().await
    }

    async fn wait_exit(&self) -> VmmExit {
        self.tended.exited().await
    }

    /// Never: its guest gets an error where the host has no room.
    fn waits_for_room(&self) -> watch::Receiver<bool> {
        watch::Sender::new(false).subscribe()
    }

    async fn resize_disk(&self, serial: &str, size: ByteSize) -> Result<(), MachineError> {
        size_now(&self.tended.state, serial, size).await?;
        let resize = ResizeDisk {
            id: disk_id(serial),
            desired_size: size.bytes(),
        };
        let answer = self.api.put("/vm.resize-disk", &resize).await;
        self.told("grow a disk", answer).await
    }

    async fn console_tail(&self, limit: usize) -> Result<Vec<u8>, MachineError> {
        self.tended.console_tail(limit).await
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.saving.is_some().then_some(self)
    }
}

/// It writes two files into a folder of its own. Its memory is not among them: that is in a file already, of which we make a
/// copy.
#[async_trait]
impl Snapshots for CloudHypervisorMachine {
    async fn save(&self, state: &Path, limit: ByteSize) -> Result<(), MachineError> {
        let doing = "save the VM";
        let Some(saving) = self.saving.clone() else {
            return Err(MachineError::Migration { doing });
        };
        let own = own_folder(&self.tended.state.run_dir);
        let destination = Snapshot {
            destination_url: format!("file://{}", own.join(SAVED).display()),
        };
        let api = Api {
            patience: SAVE_PATIENCE,
            ..self.api.clone()
        };
        let answer = api.put("/vm.snapshot", &destination).await;
        self.told(doing, answer).await?;
        let to = state.to_owned();
        on_disk(state, move || keep_saved(&own, &saving, &to, limit)).await
    }
}

fn keep_saved(own: &Path, saving: &Saving, state: &Path, limit: ByteSize) -> io::Result<()> {
    let saved = |name: &str| PathBuf::from(SAVED).join(name).display().to_string();
    // Whoever went on from that would copy all of it.
    if own.join(saved(MEMORY_COPY)).symlink_metadata().is_ok() {
        return Err(io::Error::other("it made a copy of the guest's memory"));
    }
    let (config, devices) = (open_below(own, &saved(CONFIG))?, open_below(own, &saved(STATE))?);
    keep(packed(config, devices), state, limit)?;
    copy_memory(&saving.from, &saving.to)
}

fn status_of(state: &str) -> Option<MachineStatus> {
    Some(match state {
        "Created" => MachineStatus::Prepared,
        "Running" => MachineStatus::Running,
        "Paused" => MachineStatus::Paused,
        "Shutdown" => MachineStatus::Ended,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read() {
        for (word, expected) in [
            ("Created", Some(MachineStatus::Prepared)),
            ("Running", Some(MachineStatus::Running)),
            ("Paused", Some(MachineStatus::Paused)),
            ("Shutdown", Some(MachineStatus::Ended)),
            ("BreakPoint", None),
        ] {
            assert_eq!(status_of(word), expected, "{word}");
        }
    }
}
