//! What can go wrong with a request.

use std::fmt;

use offshoot_model::{ConfigError, ErrorKind, Explain, Finding, VmName};
use offshoot_store::db::DbError;

use crate::capability::CapabilityError;
use crate::networks::NetworkError;
use crate::request::RequestKind;

/// A capability's error as a source: it keeps its own message and causes.
pub struct StageFailure(pub CapabilityError);

impl fmt::Debug for StageFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for StageFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for StageFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// Why a request to a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No VM of that name or id.
    #[error("no such VM: `{name}`")]
    NotFound {
        /// What was asked for, shortened.
        name: String,
    },
    /// More than one VM's id begins so.
    #[error("`{prefix}` is the beginning of more than one VM's id")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
    },
    /// The request makes no sense in this state.
    #[error("cannot {} VM `{name}`: it is {state}", request.verb())]
    WrongState {
        /// The VM.
        name: VmName,
        /// Where it is.
        state: &'static str,
        /// What was asked.
        request: RequestKind,
        /// The command that would help.
        hint: String,
    },
    /// The request to create it is impossible on any host.
    #[error("cannot create the VM")]
    Config(#[source] ConfigError),
    /// It gets no place on its network.
    #[error("cannot create the VM")]
    Network(#[source] NetworkError),
    /// What was asked for is not to be had here.
    #[error("cannot create the VM: {what}")]
    NotPossible {
        /// What is missing.
        what: String,
        /// How to get it.
        hint: String,
    },
    /// It was to be restored from a template.
    #[error("cannot start VM `{name}` from a template: {reason}")]
    NoTemplate {
        /// The VM.
        name: VmName,
        /// Why not.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The kernel gave no random bytes for an id.
    #[error("no random bytes for an id")]
    Random(#[source] std::io::Error),
    /// No user id is free for another VMM.
    #[error("cannot create the VM: all {count} user ids for VMMs are in use")]
    NoUid {
        /// How many there are.
        count: u32,
    },
    /// A hook failed; what was done before it was undone.
    #[error("cannot {operation} VM `{name}`: {stage} failed")]
    Stage {
        /// The VM.
        name: VmName,
        /// `start`, `stop`, `remove` ….
        operation: &'static str,
        /// `<capability>.<hook>`.
        stage: String,
        /// The capability's own error.
        #[source]
        source: StageFailure,
        /// What the capability's check of the host finds amiss.
        findings: Vec<Finding>,
    },
    /// This host cannot run it now; nothing was begun.
    #[error("cannot start VM `{name}`: {}", findings.iter().map(|f| f.message.as_str()).collect::<Vec<_>>().join("; "))]
    Unfit {
        /// The VM.
        name: VmName,
        /// Why, at least one.
        findings: Vec<Finding>,
    },
    /// The operation was cut short by another request; what was done was undone.
    #[error("cannot {operation} VM `{name}`: it was cancelled")]
    Cancelled {
        /// The VM.
        name: VmName,
        /// What was under way.
        operation: &'static str,
    },
    /// The VMM refused.
    #[error("cannot {operation} VM `{name}`")]
    Machine {
        /// The VM.
        name: VmName,
        /// What was asked.
        operation: &'static str,
        /// The VMM's words.
        #[source]
        source: StageFailure,
    },
    /// The guest's agent does not answer.
    #[error("cannot {operation} VM `{name}`: its agent does not answer")]
    NoAgent {
        /// The VM.
        name: VmName,
        /// What was asked.
        operation: &'static str,
    },
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The VM was removed while the request waited.
    #[error("VM `{name}` was removed")]
    Removed {
        /// The VM.
        name: VmName,
    },
}

impl Explain for VmError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::Removed { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } | Self::Config(_) => ErrorKind::InvalidRequest,
            Self::WrongState { .. } | Self::NoAgent { .. } => ErrorKind::WrongState,
            Self::NotPossible { .. } | Self::NoTemplate { .. } | Self::NoUid { .. } | Self::Unfit { .. } => {
                ErrorKind::NotPossible
            }
            Self::Stage { source, .. } | Self::Machine { source, .. } => source.0.kind(),
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::Network(error) => error.kind(),
            Self::Db(error) => error.kind(),
            Self::Random(_) => ErrorKind::Internal,
        }
    }

    fn exit_status(&self) -> Option<i32> {
        match self {
            Self::Stage { source, .. } => source.0.exit_status(),
            _ => None,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotFound { .. } => vec!["see what there is with `offshoot ps -a`".into()],
            Self::Ambiguous { .. } => vec!["give more digits, or the name; see `offshoot ps -a`".into()],
            Self::WrongState { hint, .. }
            | Self::NotPossible { hint, .. }
            | Self::NoTemplate { hint, .. } => {
                vec![hint.clone()]
            }
            Self::Config(ConfigError::NoCommand) => {
                vec!["name one after the image: `offshoot run IMAGE COMMAND`".into()]
            }
            Self::Config(ConfigError::Network(error)) => vec![error.hint().into()],
            Self::Config(_) => vec!["see `offshoot run --help`".into()],
            Self::NoUid { .. } => {
                vec!["remove VMs with `offshoot rm`, or raise `uid_count` in the daemon's config".into()]
            }
            Self::Stage { source, findings, .. } => {
                let mut hints = source.0.hints();
                for finding in findings {
                    let said = format!("`offshoot doctor` finds: {}", finding.message);
                    hints.push(join_hint(&said, &finding.hint));
                }
                hints
            }
            Self::Unfit { findings, .. } => {
                let mend = findings.iter().map(|finding| finding.hint.clone());
                let mut hints: Vec<_> = mend.filter(|hint| !hint.is_empty()).collect();
                hints.push("see all of it with `offshoot doctor`".into());
                hints
            }
            Self::Machine { source, .. } => source.0.hints(),
            Self::NoAgent { name, .. } => {
                vec![format!(
                    "see what its guest said with `offshoot logs --console {name}`"
                )]
            }
            Self::Network(error) => error.hints(),
            Self::Db(error) => error.hints(),
            Self::Cancelled { .. } | Self::Removed { .. } | Self::Random(_) => Vec::new(),
        }
    }
}

/// What was found and what mends it, in one line.
fn join_hint(found: &str, mend: &str) -> String {
    if mend.is_empty() {
        found.to_owned()
    } else {
        format!("{found}; {mend}")
    }
}
