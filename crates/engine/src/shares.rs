//! The virtiofsds of one run: started, watched, found again after a restart of the daemon, ended.
//!
//! ```text
//! serve ─► spawn ─► <data>/vms/<id>/<tag>.share.json ─► watch ─► died: the VM is degraded
//! adopt ─► read that file ─► reopen ────────────────────┘
//! end   ─► kill what is left, remove the file
//! ```
//!
//! A virtiofsd ends by itself when its VMM does. The file lies where the VMM cannot write: what it names is killed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offshoot_model::{ErrorKind, Explain};
use offshoot_vmm::virtiofsd::{ShareConfig, ShareServer, ShareState, Virtiofsd};

use crate::capability::CapabilityError;
use crate::paths::VmPaths;
use crate::run::Run;

/// What a share's state may take: a few paths of at most 4 KiB.
const MAX_STATE: u64 = 64 << 10;

/// The state of a share could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
struct KeepError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

impl Explain for KeepError {
    fn kind(&self) -> ErrorKind {
        match self.source.kind() {
            std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        vec!["run `offshoot doctor`".into()]
    }
}

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
        let path = run.paths.share_state(&tag);
        let text = serde_json::to_vec(server.state()).expect("our own types have no failing serializers");
        let kept = std::fs::write(&path, text);
        self.watch(run, tag, server, what);
        kept.map_err(|source| Box::new(KeepError { path, source }) as CapabilityError)
    }

    /// Finds a virtiofsd of an earlier daemon again; without one, the VM is degraded.
    pub fn adopt(&self, run: &Run, tag: &str, what: &str) {
        let state = read_state(&run.paths.share_state(tag));
        let found = state.and_then(|state| match Virtiofsd::reopen(&state) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(vm = %run.vm.name, tag, %error, "cannot look for a virtiofsd");
                None
            }
        });
        match found {
            Some(server) => self.watch(run, tag.to_owned(), server, what),
            None => run.health().degrade(died(what)),
        }
    }

    /// Ends the virtiofsd of a tag; it is no error if there is none.
    pub async fn end(&self, run: &Run, tag: &str) -> Result<(), CapabilityError> {
        let server = self.servers().remove(tag);
        if let Some(server) = server {
            server
                .kill()
                .await
                .map_err(|error| Box::new(error) as CapabilityError)?;
        }
        let path = run.paths.share_state(tag);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Box::new(KeepError { path, source }))
            }
            _ => Ok(()),
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

fn read_state(path: &std::path::Path) -> Option<ShareState> {
    use std::io::Read as _;
    let mut text = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(MAX_STATE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The processes that serve a VM's shares now; a virtiofsd is one that waits and one that works.
pub fn share_pids(paths: &VmPaths) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(paths.data()) else {
        return Vec::new();
    };
    let mut pids = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if !path.to_string_lossy().ends_with(VmPaths::SHARE_STATE) {
            continue;
        }
        let Some(state) = read_state(&path).filter(|state| state.process.is_alive()) else {
            continue;
        };
        pids.push(state.process.pid);
        let members = offshoot_sys::process::session_members(&state.process).unwrap_or_default();
        pids.extend(members.iter().map(|member| member.pid));
    }
    pids
}
