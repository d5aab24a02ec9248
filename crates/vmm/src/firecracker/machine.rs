//! One Firecracker with its VM. A task per machine waits for its end, saves the guest's last words, and tidies up.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::ByteSize;
use offshoot_sys::process::Signal;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::driver::ended_by_itself;
use super::requests::{
    Action, ActionType, DrivePath, STATE_FILE, SnapshotCreate, VmState, drive_id, drive_link,
};
use crate::grow::grow;
use crate::http::Api;
use crate::machine::{
    ControlError, ExitCause, Machine, MachineError, MachineState, MachineStatus, Snapshots, VmmExit,
};
use crate::saved::{SAVE_PATIENCE, keep, on_disk, open_below};
use crate::tended::{Tended, own_folder};

pub(crate) struct FirecrackerMachine {
    tended: Arc<Tended>,
    api: Api,
    traits: Traits,
    _watcher: AbortOnDropHandle<()>,
}

/// What is special about one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    /// It was launched with a file for its memory.
    pub(crate) saves: bool,
    /// [`super::FirecrackerFacts::deaf_after_pause`].
    pub(crate) deaf_after_pause: bool,
}

impl FirecrackerMachine {
    pub(crate) fn start(tended: Arc<Tended>, api: Api, traits: Traits) -> Self {
        let watcher = tokio::spawn(watch_until_gone(Arc::clone(&tended)));
        Self {
            tended,
            api,
            traits,
            _watcher: AbortOnDropHandle::new(watcher),
        }
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

    async fn set_state(&self, doing: &'static str, state: &'static str) -> Result<(), MachineError> {
        let answer = self.api.patch("/vm", &VmState { state }).await;
        self.told(doing, answer).await
    }
}

async fn watch_until_gone(tended: Arc<Tended>) {
    let halted = async {
        match &tended.console {
            Some(console) => console.halted().await,
            None => std::future::pending().await,
        }
    };
    let mut has_halted = false;
    tokio::select! {
        biased;
        _ = tended.process.wait_exit() => {}
        // A guest that was switched off by its own init: this machine cannot be, so its kernel stops and Firecracker stays.
        () = halted => {
            has_halted = true;
            if let Err(error) = tended.process.send_signal(Signal::KILL) {
                tracing::warn!(vm = %tended.state.vm, %error, "cannot end a VMM whose guest has halted");
            }
        }
    }
    let by_itself = async |exit| {
        let Some(console) = &tended.console else {
            return if ended_by_itself(exit, false) {
                ExitCause::GuestPowerOff
            } else {
                ExitCause::Died
            };
        };
        if console.tells_of_panic().await {
            ExitCause::GuestPanic
        } else if has_halted || ended_by_itself(exit, console.tells_of_restart().await) {
            // The agent switches this machine off by a reset, so the two cannot be told apart.
            ExitCause::GuestPowerOff
        } else {
            ExitCause::Died
        }
    };
    tended.see_off(by_itself).await;
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn state(&self) -> &MachineState {
        &self.tended.state
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        let doing = "ask for the status";
        let answer = match self.api.get("/").await {
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
        let doing = "pause the VM";
        self.set_state(doing, "Paused").await?;
        if self.traits.deaf_after_pause && !self.traits.saves {
            // Else its guest would never be heard of again. This way it sees its connections reset, and others come.
            let reset = SnapshotCreate::for_its_reset_alone();
            match self.api.put("/snapshot/create", &reset).await {
                Ok(_) | Err(ControlError::Refused { .. }) => {}
                Err(source) => return Err(self.tended.control(doing, source).await),
            }
        }
        Ok(())
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.set_state("resume the VM", "Resumed").await
    }

    /// Three keys: all that this machine has. A kernel with a keyboard resets at once, unless its PID 1 asked to be told.
    async fn power_button(&self) -> Result<(), MachineError> {
        let keys = Action {
            action_type: ActionType::SendCtrlAltDel,
        };
        let answer = self.api.put("/actions", &keys).await;
        self.told("press the keys that end the guest", answer).await
    }

    /// It has no request to quit. What the guest wrote is in the host's cache by the time that the guest knows, so a signal
    /// loses nothing.
    async fn quit(&self) -> Result<(), MachineError> {
        self.tended.note_quit();
        self.tended.signal_to_end().await
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
        grow(&self.tended.state, serial, size).await?;
        let drive = DrivePath {
            drive_id: drive_id(serial),
            path_on_host: drive_link(serial),
        };
        let answer = self
            .api
            .patch(&format!("/drives/{}", drive.drive_id), &drive)
            .await;
        self.told("grow a disk", answer).await
    }

    async fn console_tail(&self, limit: usize) -> Result<Vec<u8>, MachineError> {
        self.tended.console_tail(limit).await
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.traits.saves.then_some(self)
    }
}

/// It writes the memory into the file that it was launched with, and the devices into its own folder.
#[async_trait]
impl Snapshots for FirecrackerMachine {
    async fn save(&self, state: &Path, limit: ByteSize) -> Result<(), MachineError> {
        let api = Api {
            patience: SAVE_PATIENCE,
            ..self.api.clone()
        };
        let answer = api.put("/snapshot/create", &SnapshotCreate::here()).await;
        self.told("save the VM", answer).await?;
        let (own, to) = (own_folder(&self.tended.state.run_dir), state.to_owned());
        on_disk(state, move || keep(open_below(&own, STATE_FILE)?, &to, limit)).await
    }
}

fn status_of(state: &str) -> Option<MachineStatus> {
    Some(match state {
        "Not started" => MachineStatus::Prepared,
        "Running" => MachineStatus::Running,
        "Paused" => MachineStatus::Paused,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use offshoot_sys::process::Exit;

    use super::*;

    #[test]
    fn states_and_ends_are_read() {
        for (word, expected) in [
            ("Not started", Some(MachineStatus::Prepared)),
            ("Running", Some(MachineStatus::Running)),
            ("Paused", Some(MachineStatus::Paused)),
            ("", None),
        ] {
            assert_eq!(status_of(word), expected, "{word}");
        }
        assert!(ended_by_itself(Some(Exit::Code(0)), false));
        assert!(!ended_by_itself(Some(Exit::Code(148)), true));
        assert!(!ended_by_itself(Some(Exit::Signal(9)), true));
        assert!(ended_by_itself(None, true) && !ended_by_itself(None, false));
    }
}
