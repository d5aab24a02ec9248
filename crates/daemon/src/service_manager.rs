//! What the service manager is told (sd_notify(3)). Without one, `NOTIFY_SOCKET` is not set, and nothing is said.

use std::path::Path;

use sd_notify::NotifyState;

/// The daemon answers at `socket`.
pub fn tell_ready(socket: &Path) {
    let status = format!("serving at {}", socket.display());
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The daemon was asked to end.
pub fn tell_stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping; VMs run on")]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
