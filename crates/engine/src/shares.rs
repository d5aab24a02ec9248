//! The virtiofsds of one run: started, watched, found again after a restart of the daemon, ended.
//!
//! ```text
//! serve ─► spawn ─► <socket>.json ─► watch ─► died: the VM is degraded
//! adopt ─► read that file ─► reopen ──┘
//! end   ─► kill what is left
//! ```
//!
//! A virtiofsd ends by itself when its VMM does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offshoot_model::{KernelObject, ObjectKind};
use offshoot_vmm::virtiofsd::{ShareConfig, ShareServer, ShareState, Virtiofsd};

use crate::capability::CapabilityError;
use crate::paths::VmPaths;
use crate::run::Run;

/// The virtiofsds of one run, by tag.
#[derive(Default)]
pub struct Shares {
    servers: Mutex<BTreeMap<String, Arc<ShareServer>>>,
}

impl Shares {
    fn servers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<ShareServer>>> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a virtiofsd and watches it. `what` it is for goes into the message when it dies.
    pub async fn serve(
        &self,
        run: &Run,
        virtiofsd: &Virtiofsd,
        config: &ShareConfig,
        what: &str,
    ) -> Result<(), CapabilityError> {
        let tag = config.tag.clone();
        let server = virtiofsd
            .serve(config)
            .await
            .map_err(|error| Box::new(error) as CapabilityError)?;
        self.watch(run, tag, server, what);
        Ok(())
    }

    /// Finds a virtiofsd of an earlier daemon again; without one, the VM is degraded.
    pub fn adopt(&self, run: &Run, tag: &str, what: &str) {
        let found = ShareState::load(&run.paths.share_socket(tag)).and_then(|state| match state {
            Some(state) => Virtiofsd::reopen(&state),
            None => Ok(None),
        });
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(vm = %run.vm.name, tag, %error, "cannot look for a virtiofsd");
            None
        });
        match found {
            Some(server) => self.watch(run, tag.to_owned(), server, what),
            None => run.health().degrade(died(what)),
        }
    }

    /// Ends the virtiofsd of a tag; it is no error if there is none.
    pub async fn end(&self, tag: &str) -> Result<(), CapabilityError> {
        let server = self.servers().remove(tag);
        match server {
            None => Ok(()),
            Some(server) => server
                .kill()
                .await
                .map_err(|error| Box::new(error) as CapabilityError),
        }
    }

    fn watch(&self, run: &Run, tag: String, server: ShareServer, what: &str) {
        let server = Arc::new(server);
        self.servers().insert(tag, Arc::clone(&server));
        let (over, health, message) = (run.over.clone(), run.health(), died(what));
        tokio::spawn(async move {
            tokio::select! {
                () = over.cancelled() => {}
                exit = server.wait_exit() => {
                    tracing::debug!(?exit, "a virtiofsd ended");
                    health.degrade(message);
                }
            }
        });
    }
}

fn died(what: &str) -> String {
    format!("{what} is gone: its virtiofsd died")
}

/// The virtiofsd at a socket, as it is recorded.
pub(crate) fn share_object(socket: &Path) -> KernelObject {
    KernelObject {
        kind: ObjectKind::Process,
        name: ShareState::file(socket).display().to_string(),
    }
}

/// The sockets in a run folder beside which a living virtiofsd is recorded.
pub(crate) fn served_sockets(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let served = |path: &PathBuf| {
        let state = ShareState::load(path).ok().flatten();
        state.is_some_and(|state| state.process.is_alive())
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(served)
        .collect()
}

/// Ends the virtiofsd that is recorded beside a socket; nothing when there is none.
pub(crate) async fn end_served(socket: &Path) -> Result<(), CapabilityError> {
    let Ok(Some(state)) = ShareState::load(socket) else {
        return Ok(());
    };
    match Virtiofsd::reopen(&state) {
        Ok(Some(server)) => server
            .kill()
            .await
            .map_err(|error| Box::new(error) as CapabilityError),
        // Gone, or nothing that can be taken hold of.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// The processes that serve a VM's shares now; a virtiofsd is one that waits and one that works.
pub fn share_pids(paths: &VmPaths) -> Vec<u32> {
    let mut pids = Vec::new();
    for socket in served_sockets(paths.run()) {
        let Some(state) = ShareState::load(&socket).ok().flatten() else {
            continue;
        };
        pids.push(state.process.pid);
        let members = offshoot_sys::process::session_members(&state.process).unwrap_or_default();
        pids.extend(members.iter().map(|member| member.pid));
    }
    pids
}
