//! Room on the host: a VM that does not fit beside those that run is not started.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, Finding, Severity};
use offshoot_sys::memory::{HostMemory, host_memory};

use super::finding;
use crate::admission::{
    AdmissionRules, DataRoom, HostRoom, Ledger, Promised, Refusal, admit_creation, admit_start, most_promised,
};
use crate::capability::{Capability, CapabilityError};
use crate::run::Run;

/// Keeps count of what VMs that run were promised.
pub struct AdmissionCapability {
    /// The daemon's settings.
    pub rules: AdmissionRules,
    /// Where VMs' disks lie.
    pub data_dir: PathBuf,
    /// What was promised; what creates VMs asks it, too.
    pub ledger: Arc<Ledger>,
}

/// A VM is not let in.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// It does not fit.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is not known whether it does.
    #[error("cannot tell how much room there is in {}", what.display())]
    Unknown {
        /// Where it was looked for.
        what: PathBuf,
        /// Why it is not known.
        #[source]
        source: std::io::Error,
    },
}

impl Explain for AdmissionError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused(refusal) => refusal.kind(),
            Self::Unknown { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Refused(refusal) => refusal.hints(),
            Self::Unknown { what, .. } => vec![format!("look at {}", what.display())],
        }
    }
}

impl AdmissionCapability {
    /// Refuses a VM that could not be started now, or whose disks could not be made. `vms` exist, and there are `uids`
    /// user ids for VMs.
    pub fn admit_creation(&self, memory: ByteSize, vms: u64, uids: u32) -> Result<(), AdmissionError> {
        let room = offshoot_sys::space::room(&self.data_dir).map_err(|source| AdmissionError::Unknown {
            what: self.data_dir.clone(),
            source,
        })?;
        let data = DataRoom {
            free: ByteSize::from_bytes(room.free),
            free_inodes: room.free_inodes,
            free_uids: u64::from(uids).saturating_sub(vms),
            uids,
        };
        admit_creation(&self.rules, &host()?, &data, self.ledger.promised(), memory)?;
        Ok(())
    }
}

fn host() -> Result<HostRoom, AdmissionError> {
    let HostMemory { total, available } = host_memory().map_err(|source| AdmissionError::Unknown {
        what: "/proc/meminfo".into(),
        source,
    })?;
    Ok(HostRoom {
        memory: ByteSize::from_bytes(total),
        memory_available: ByteSize::from_bytes(available),
    })
}

#[async_trait]
impl Capability for AdmissionCapability {
    fn name(&self) -> &'static str {
        "admission"
    }

    async fn check(&self) -> Vec<Finding> {
        let host = match host() {
            Ok(host) => host,
            Err(error) => {
                let found = finding(self.name(), Severity::Failure, error.to_string(), "mount /proc");
                return vec![found.id("memory-unknown").cost("no VM can be started")];
            }
        };
        let Promised { vms, memory } = self.ledger.promised();
        let most = most_promised(&self.rules, &host);
        // The smallest VM that a user would think of.
        let another = admit_start(&self.rules, &host, self.ledger.promised(), ByteSize::from_mib(64));
        vec![match another {
            Ok(()) => Finding::ok(
                self.name(),
                format!("{memory} of memory promised to {vms} running VMs, of at most {most}"),
            )
            .id("memory"),
            Err(refusal) => {
                let hint = refusal.hints().into_iter().next().unwrap_or_default();
                finding(self.name(), Severity::Warning, refusal.to_string(), hint)
                    .id("memory-promised")
                    .cost("no more VMs are started")
            }
        }]
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        if run.is_warm() {
            return Ok(());
        }
        let memory = run.vm.definition.config.memory;
        let admitted = host().and_then(|host| {
            let admit = |promised| admit_start(&self.rules, &host, promised, memory);
            Ok(self.ledger.promise(&run.vm.id, memory, admit)?)
        });
        admitted.map_err(|error| Box::new(error) as CapabilityError)
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        self.ledger.found(&run.vm.id, run.vm.definition.config.memory);
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        self.ledger.release(&run.vm.id);
        Ok(())
    }
}
