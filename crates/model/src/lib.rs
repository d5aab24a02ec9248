//! Plain values that every other crate shares: ids, names, digests, sizes, what a VM is asked to be.
//!
//! Nothing here does I/O, is async, or knows a back end. A value that exists is valid: parsing is the
//! only way in, also through serde.

mod digest;
mod error;
mod event;
mod finding;
mod id;
mod network;
mod network_rules;
mod object;
mod percentile;
mod progress;
mod publish;
mod size;
mod stage;
mod state;
mod vm;

pub use digest::{Digest, DigestError};
pub use error::{ErrorKind, Explain};
pub use event::{Event, EventAction};
pub use finding::{Finding, Fix, Severity};
pub use id::{BaseId, IdError, KernelId, NameError, OperationId, TemplateId, VmId, VmName};
pub use network::{
    Allowed, Attachment, Mac, MacError, Network, NetworkChoice, NetworkConfig, NetworkName, NetworkNameError,
    PublishedPort, SshConfig, Transport,
};
pub use network_rules::NetworkConfigError;
pub use object::{KernelObject, ObjectKind};
pub use percentile::percentile;
pub use progress::{Progress, ProgressEvent, ProgressUnit, TaskId};
pub use publish::{GuestPort, PublishError, PublishMistake};
pub use size::{ByteSize, ByteSizeError};
pub use stage::{OperationOutcome, OperationTiming, StageOutcome, StageTiming};
pub use state::{ExitReason, ExitStatus, VmState};
pub use vm::{
    Boot, ConfigError, DEFAULT_DISK, EnvVar, EnvVarError, ImageConfig, Mount, ProcessConfig, RestartPolicy,
    RootRequest, VmConfig, VmmRequest,
};
