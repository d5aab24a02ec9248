//! The client's own keys for programs in the guest: a socket that leads to the client's SSH agent.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::server::Handle;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::forward::{Guest, Remote};

/// Programs that ask the client's agent at once.
const MAX_CONNECTIONS: usize = 64;

/// Where its folder is made.
const FOLDER: &str = "/tmp";

/// Makes the socket in a folder of its own, which only the user can enter; both are gone when `over` says so.
pub(super) async fn open(guest: Guest, handle: Handle, over: CancellationToken) -> io::Result<PathBuf> {
    let folder = guest.workload.run_as(&guest.identity, make_folder).await?;
    let path = folder.join("agent");
    let listener = match guest.bind_local(path.clone()).await {
        Ok(listener) => listener,
        Err(error) => {
            guest.remove(vec![folder]).await;
            return Err(error);
        }
    };
    let tasks = guest.server.tasks.clone();
    let remote = Remote {
        guest,
        handle,
        cancel: over,
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    };
    tasks.spawn(accept(remote, listener, vec![path.clone(), folder]));
    Ok(path)
}

/// A folder that nobody could have made before.
fn make_folder() -> io::Result<PathBuf> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let folder = Path::new(FOLDER).join(format!("ssh-{:016x}", u64::from_ne_bytes(random)));
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    Ok(folder)
}

async fn accept(remote: Remote, listener: UnixListener, paths: Vec<PathBuf>) {
    while let Some(((socket, _), permit)) = remote.next(|| listener.accept()).await {
        let (guest, handle) = (remote.guest.clone(), remote.handle.clone());
        remote.guest.server.tasks.spawn(async move {
            if let Ok(channel) = handle.channel_open_agent().await {
                guest.carry(channel, socket).await;
            }
            drop(permit);
        });
    }
    drop(listener);
    remote.guest.remove(paths).await;
}
