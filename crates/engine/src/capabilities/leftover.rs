//! Ending a process that a daemon before this one started and that belongs to no VM any more.

use std::io;
use std::time::Duration;

use offshoot_model::{ErrorKind, Explain};
use offshoot_sys::process::{PidFd, ProcessIdentity, Signal};

use crate::capability::CapabilityError;

/// How long a killed process may take to go: the kernel frees its memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// The process is still there.
#[derive(Debug, thiserror::Error)]
#[error("cannot end process {pid}")]
struct EndError {
    pid: u32,
    #[source]
    source: io::Error,
}

impl Explain for EndError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        vec![format!("look at /proc/{}", self.pid)]
    }
}

/// Kills exactly this process and waits until it is gone; nothing when it is gone already.
pub(super) async fn end_process(identity: &ProcessIdentity) -> Result<(), CapabilityError> {
    let failed = |source| {
        Box::new(EndError {
            pid: identity.pid,
            source,
        }) as CapabilityError
    };
    let Some(process) = PidFd::open(identity).map_err(failed)? else {
        return Ok(());
    };
    process.send_signal(Signal::KILL).map_err(failed)?;
    match tokio::time::timeout(PATIENCE, process.wait_exit()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(failed(io::Error::from(io::ErrorKind::TimedOut))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_sys::process::{DetachedCommand, spawn_detached};

    #[tokio::test]
    async fn exactly_the_process_that_is_meant_is_ended() {
        let mut command = DetachedCommand::new("/bin/sleep");
        command.args = vec!["1000".into()];
        let (identity, process) = spawn_detached(command).unwrap();
        // The same number at another time is somebody else.
        let stranger = ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity.clone()
        };
        end_process(&stranger).await.unwrap();
        assert!(process.is_alive());
        end_process(&identity).await.unwrap();
        assert!(!process.is_alive());
        end_process(&identity).await.unwrap();
    }
}
