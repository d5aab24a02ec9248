//! The agent's own SSH server: into any image, with nothing in the image.
//!
//! ```text
//!   port on the guest's addresses ── listener ──┐
//!   the host's `Ssh` call ───────── rpc_stream ─┴─► connection ─► handler (what the client asks for)
//!                                                                  │
//!        config (keys, algorithms)                                 ├─► shell ─► login ─► spawn: a process of the guest
//!                                                                  │                      (sftp: this program again)
//!        inbox (what the client sent and nobody took yet)          ├─► forward: sockets of the guest, both ways
//!                                                                  └─► agent_socket: the client's keys, in the guest
//! ```
//!
//! Keys are the only way in, and whoever has one may be anybody of the guest. Everything that a client asks for happens
//! in the guest's namespace and as the user it logged in as.
//!
//! Not here: who may have a key (the host decides), and files (`crate::sftp`, a process of its own).

mod agent_socket;
mod config;
mod connection;
mod forward;
mod handler;
mod inbox;
mod listener;
mod login;
mod modes;
mod pump;
mod resolve;
mod rpc_stream;
mod shell;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use russh::keys::PublicKey;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use self::config::{SshPlan, parse_keys, plan};
pub(crate) use self::connection::Peer;
pub(crate) use self::listener::listen;
pub(crate) use self::rpc_stream::{RpcStream, rpc_stream};
use crate::count::Count;
use crate::spawn;
use crate::workload::Workload;

/// How long connections have to say good-bye when the VM ends.
const GOOD_BYE: Duration = Duration::from_secs(1);

/// This program, as every process can execute it, whatever it sees of the file system.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Where images have a server of their own.
const SSHD_PROGRAMS: [&str; 6] = [
    "/usr/sbin/sshd",
    "/usr/bin/sshd",
    "/usr/local/sbin/sshd",
    "/sbin/sshd",
    "/usr/sbin/dropbear",
    "/usr/local/sbin/dropbear",
];

/// Whether the image has an SSH server that its init may start. Must be called where paths are the guest's.
pub(crate) fn image_has_sshd() -> bool {
    let there = |program: &&str| spawn::resolve(program, "", Path::new("/")).is_ok();
    SSHD_PROGRAMS.iter().any(there)
}

/// The server of one guest.
pub(crate) struct Server {
    plan: SshPlan,
    /// What clients see; gone once the VM ends.
    workload: Mutex<Option<Arc<Workload>>>,
    count: Arc<Count>,
    /// The program that speaks sftp when it is called with [`crate::SFTP_ARGUMENT`].
    sftp_program: PathBuf,
    /// The VM ends.
    closing: CancellationToken,
    /// Everything that runs for a client.
    tasks: TaskTracker,
}

impl Server {
    /// A server that nobody can reach yet.
    pub(crate) fn new(plan: SshPlan, workload: Arc<Workload>, count: Arc<Count>) -> Arc<Self> {
        Arc::new(Self::with_sftp(plan, workload, count, THIS_PROGRAM.into()))
    }

    fn with_sftp(plan: SshPlan, workload: Arc<Workload>, count: Arc<Count>, sftp_program: PathBuf) -> Self {
        Self {
            plan,
            workload: Mutex::new(Some(workload)),
            count,
            sftp_program,
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// What was asked for.
    pub(crate) fn plan(&self) -> &SshPlan {
        &self.plan
    }

    fn workload(&self) -> Option<Arc<Workload>> {
        self.workload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Serves one connection that comes over the agent's channel.
    pub(crate) fn accept(self: &Arc<Self>, stream: RpcStream, peer: Peer, more_keys: Vec<PublicKey>) {
        let connection = connection::serve(Arc::clone(self), stream, peer, more_keys, None);
        self.tasks.spawn(connection);
    }

    /// Nobody new gets in from here on.
    pub(crate) fn refuse(&self) {
        self.workload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Ends every connection, and with it all that holds on to the guest's files.
    pub(crate) async fn close(&self) {
        self.refuse();
        self.closing.cancel();
        self.tasks.close();
        // A client that does not take the good-bye is cut off; what is left then is only memory.
        let _ = tokio::time::timeout(GOOD_BYE, self.tasks.wait()).await;
    }
}
