//! What is said when a session ended: a VM does not stop because nobody looks at it any more.

use std::time::{Duration, Instant};

use offshoot_api::client::Client;
use offshoot_api::vm::{Sessions, VmDetails};
use offshoot_model::VmState;

use crate::output::note;

/// How long it is waited at most until the session that ended is not counted any more.
const UNCOUNTED: Duration = Duration::from_secs(1);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(50);
/// Where the daemon listens when nobody says anything.
const DEFAULT_SOCKET: &str = "/run/offshoot/api.sock";

/// What is known of a VM before a session begins.
#[derive(Debug)]
pub(super) struct Reminder {
    id: String,
    before: Sessions,
}

impl Reminder {
    /// Looks who is there already.
    pub(super) async fn before(client: &Client, id: &str) -> Result<Self, crate::error::Failure> {
        let details = client.vm(id).await?;
        Ok(Self {
            id: id.to_owned(),
            before: details.summary.sessions,
        })
    }

    /// Says that the VM runs on, if it does. A daemon that does not answer is no reason for another status than ssh's.
    pub(super) async fn show(self, client: &Client) {
        let began = Instant::now();
        loop {
            // The end of the session is on its way from the guest to the daemon.
            tokio::time::sleep(LOOK).await;
            let Ok(details) = client.vm(&self.id).await else {
                return;
            };
            let uncounted = details.summary.sessions.ssh <= self.before.ssh;
            if uncounted || began.elapsed() >= UNCOUNTED {
                if let Some(text) = text(&details, &prefix(client)) {
                    note(&text);
                }
                return;
            }
        }
    }
}

/// The beginning of a command that reaches the same daemon.
fn prefix(client: &Client) -> String {
    let socket = client.socket();
    let by_itself = std::env::var_os("OFFSHOOT_SOCKET").unwrap_or_else(|| DEFAULT_SOCKET.into());
    if socket.as_os_str() == by_itself {
        "offshoot".to_owned()
    } else {
        format!("offshoot --socket {}", socket.display())
    }
}

/// The line; nothing for a VM that does not run, or goes by itself.
fn text(vm: &VmDetails, offshoot: &str) -> Option<String> {
    let runs = matches!(vm.summary.state, VmState::Running | VmState::Paused);
    if !runs || vm.config.auto_remove {
        return None;
    }
    let name = &vm.summary.name;
    let others = match vm.summary.sessions.total() {
        0 => String::new(),
        1 => ", with 1 other session".to_owned(),
        n => format!(", with {n} other sessions"),
    };
    Some(format!(
        "VM `{name}` is still running{others}; stop it with `{offshoot} stop {name}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::VmConfig;
    use serde_json::json;

    #[test]
    fn it_is_said_who_else_is_there_and_how_to_stop_it() {
        let mut vm: VmDetails = serde_json::from_value(json!({
            "id": "abababababab", "name": "web", "image": "img", "command": "sh", "state": "running",
            "created_ms": 0, "started_ms": null, "finished_ms": null, "exit": null,
            "config": VmConfig::new("img"), "image_digest": "", "base": "", "kernel": "", "process": null,
            "vmm": {"chosen": "qemu", "reasons": []}, "root": {"chosen": "block", "reasons": []}, "pid": null,
            "failure": [], "directory": "", "disk_bytes": 0, "timings": []
        }))
        .unwrap();
        let mut check = |ssh, exec, expected: &str| {
            vm.summary.sessions = Sessions { ssh, exec };
            assert_eq!(text(&vm, "offshoot").unwrap(), expected);
        };
        check(
            0,
            0,
            "VM `web` is still running; stop it with `offshoot stop web`",
        );
        check(
            0,
            1,
            "VM `web` is still running, with 1 other session; stop it with `offshoot stop web`",
        );
        check(
            2,
            1,
            "VM `web` is still running, with 3 other sessions; stop it with `offshoot stop web`",
        );
        vm.config.auto_remove = true;
        assert_eq!(text(&vm, "offshoot"), None);
        vm.config.auto_remove = false;
        vm.summary.state = VmState::Stopped;
        assert_eq!(text(&vm, "offshoot"), None);
    }
}
