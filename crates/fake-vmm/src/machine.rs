//! The machine itself: what QMP asks about and changes, and what holds the guest still.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use base64::Engine;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// How a guest ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It switches the machine off.
    PowerOff,
    /// It asks for a reset, which is not granted.
    Reset,
    /// Its kernel panics.
    Panic,
}

/// One machine.
pub(crate) struct Machine {
    state: Mutex<State>,
}

struct State {
    /// QEMU's `RunState`.
    run_state: &'static str,
    console: Vec<u8>,
    /// Node names and files.
    disks: HashMap<String, PathBuf>,
    /// Where lines for the client go that is connected.
    client: Option<mpsc::UnboundedSender<String>>,
    /// The process ends with this status.
    exit: Option<i32>,
    /// Parts of the guest that stand still.
    halted: Vec<Waker>,
}

impl Machine {
    /// A machine whose guest runs.
    pub(crate) fn new(console: &str, disks: HashMap<String, PathBuf>) -> Self {
        Self {
            state: Mutex::new(State {
                run_state: "running",
                console: console.as_bytes().to_vec(),
                disks,
                client: None,
                exit: None,
                halted: Vec::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends events to this client from now on, or to none.
    pub(crate) fn set_client(&self, client: Option<mpsc::UnboundedSender<String>>) {
        self.state().client = client;
    }

    /// The status to exit with, once told to.
    pub(crate) fn exit(&self) -> Option<i32> {
        self.state().exit
    }

    /// Whether the guest's processor runs.
    pub(crate) fn is_running(&self) -> bool {
        self.state().run_state == "running"
    }

    /// Whether there is a disk with this serial.
    pub(crate) fn has_disk(&self, serial: &str) -> bool {
        self.state().disks.contains_key(&format!("disk-{serial}"))
    }

    /// Ready while the processor runs. What is held up here goes on when it runs again.
    pub(crate) fn poll_running(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.run_state == "running" {
            return Poll::Ready(());
        }
        if !state.halted.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.halted.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// The guest ends. The process stays until it is told to quit (`-no-shutdown`).
    pub(crate) fn end(&self, end: End) {
        let mut state = self.state();
        if state.run_state == "shutdown" || state.run_state == "guest-panicked" {
            return;
        }
        let (run_state, reason) = match end {
            End::PowerOff => ("shutdown", "guest-shutdown"),
            End::Reset => ("shutdown", "guest-reset"),
            End::Panic => ("guest-panicked", "guest-panic"),
        };
        state.run_state = run_state;
        if end == End::Panic {
            // In the words of `kernel/panic.c`.
            state
                .console
                .extend_from_slice(b"Kernel panic - not syncing: sysrq triggered crash\r\n");
            state.tell("GUEST_PANICKED", &json!({"action": "shutdown"}));
        }
        state.tell("SHUTDOWN", &json!({"guest": true, "reason": reason}));
        state.tell("STOP", &json!({}));
    }

    /// What the console said since it was taken last.
    pub(crate) fn take_console(&self) -> Vec<u8> {
        std::mem::take(&mut self.state().console)
    }

    /// Carries out a QMP command; an error is QEMU's description of it.
    pub(crate) fn carry_out(&self, command: &str, arguments: &Value, deaf: bool) -> Result<Value, String> {
        self.state().carry_out(command, arguments, deaf)
    }
}

impl State {
    fn tell(&self, event: &str, data: &Value) {
        if let Some(client) = &self.client {
            let line = json!({"event": event, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}});
            // A client that left is told nothing.
            let _ = client.send(line.to_string());
        }
    }

    fn carry_out(&mut self, command: &str, arguments: &Value, deaf: bool) -> Result<Value, String> {
        match command {
            "qmp_capabilities" | "system_powerdown" => {}
            "query-status" => {
                return Ok(json!({"status": self.run_state, "running": self.run_state == "running"}));
            }
            "stop" => self.change(("running", "paused"), "STOP"),
            "cont" => {
                self.change(("paused", "running"), "RESUME");
                self.halted.drain(..).for_each(Waker::wake);
            }
            "quit" if deaf => {}
            "quit" => {
                self.tell("SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}));
                self.exit = Some(0);
            }
            "ringbuf-read" => {
                let said = std::mem::take(&mut self.console);
                return Ok(Value::String(
                    base64::engine::general_purpose::STANDARD.encode(said),
                ));
            }
            "query-named-block-nodes" => {
                let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
                let node = |(name, path)| json!({"node-name": name, "image": {"virtual-size": size(path)}});
                return Ok(self.disks.iter().map(node).collect());
            }
            "block_resize" => {
                let path = arguments["node-name"]
                    .as_str()
                    .and_then(|node| self.disks.get(node));
                let path = path.ok_or("Cannot find device")?;
                let size = arguments["size"]
                    .as_u64()
                    .ok_or("Parameter 'size' expects a number")?;
                let file = std::fs::OpenOptions::new().write(true).open(path);
                file.and_then(|file| file.set_len(size))
                    .map_err(|e| e.to_string())?;
            }
            _ => return Err(format!("The command {command} has not been found")),
        }
        Ok(json!({}))
    }

    fn change(&mut self, (from, to): (&str, &'static str), event: &str) {
        if self.run_state == from {
            self.run_state = to;
            self.tell(event, &json!({}));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(machine: &Machine) -> Value {
        machine.carry_out("query-status", &Value::Null, false).unwrap()["status"].clone()
    }

    #[test]
    fn a_guest_ends_once_and_says_why() {
        for (end, reason, run_state) in [
            (End::PowerOff, "guest-shutdown", "shutdown"),
            (End::Reset, "guest-reset", "shutdown"),
            (End::Panic, "guest-panic", "guest-panicked"),
        ] {
            let machine = Machine::new("", HashMap::new());
            let (sender, mut said) = mpsc::unbounded_channel();
            machine.set_client(Some(sender));
            machine.end(end);
            machine.end(End::PowerOff);
            machine.set_client(None);
            let mut lines = Vec::new();
            while let Ok(line) = said.try_recv() {
                lines.push(serde_json::from_str::<Value>(&line).unwrap());
            }
            let shutdowns: Vec<_> = lines.iter().filter(|line| line["event"] == "SHUTDOWN").collect();
            assert_eq!(shutdowns.len(), 1, "{lines:?}");
            assert_eq!(shutdowns[0]["data"]["reason"], reason);
            assert_eq!(status(&machine), run_state);
        }
    }

    #[test]
    fn a_halted_guest_goes_on_when_it_is_told_to() {
        let machine = Machine::new("", HashMap::new());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(machine.poll_running(&mut cx).is_ready());
        machine.carry_out("stop", &Value::Null, false).unwrap();
        assert!(machine.poll_running(&mut cx).is_pending());
        machine.carry_out("cont", &Value::Null, false).unwrap();
        assert!(machine.poll_running(&mut cx).is_ready());
        machine.end(End::PowerOff);
        machine.carry_out("cont", &Value::Null, false).unwrap();
        assert!(machine.poll_running(&mut cx).is_pending(), "it is off for good");
    }
}
