//! Why the host could not connect or a call failed.

use std::io;
use std::path::PathBuf;

use offshoot_model::{ErrorKind, Explain};
use tonic::{Code, Status};

use crate::limits::MAX_MESSAGE_CHARS;
use crate::link::LinkError;

/// Why there is no connection to an agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The VMM's socket cannot be opened.
    #[error("cannot open the agent's socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The guest did not answer.
    #[error("cannot start a conversation with the agent")]
    Link {
        /// Why.
        #[source]
        source: LinkError,
    },
    /// HTTP/2 could not be started.
    #[error("cannot speak HTTP/2 with the agent")]
    Http {
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

impl Explain for ConnectError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Link { source } => source.kind(),
            Self::Socket { .. } => ErrorKind::WrongState,
            Self::Http { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Link { source } => source.hints(),
            Self::Socket { .. } | Self::Http { .. } => {
                vec!["see whether the VM still runs: `offshoot ps -a`".to_owned()]
            }
        }
    }
}

/// Why a call to an agent failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection is lost; the process or copy may have gone on.
    #[error("cannot reach the agent any more (call `{call}`): {message}")]
    Gone {
        /// The call.
        call: &'static str,
        /// What the connection said.
        message: String,
    },
    /// The agent refused, and says why.
    #[error("{message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// What kind of refusal.
        kind: ErrorKind,
        /// The agent's words, without control characters.
        message: String,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer the call `{call}` in time")]
    Late {
        /// The call.
        call: &'static str,
    },
    /// The agent sent something that makes no sense.
    #[error("the agent answered the call `{call}` with {what}")]
    BadReply {
        /// The call.
        call: &'static str,
        /// What it sent.
        what: &'static str,
    },
}

impl CallError {
    /// The error that a gRPC status stands for.
    pub(crate) fn of(call: &'static str, status: &Status) -> Self {
        let message = printable(status.message());
        let kind = match status.code() {
            Code::NotFound => ErrorKind::NotFound,
            Code::FailedPrecondition => ErrorKind::WrongState,
            Code::InvalidArgument => ErrorKind::InvalidRequest,
            Code::AlreadyExists => ErrorKind::Conflict,
            Code::ResourceExhausted => ErrorKind::NoSpace,
            Code::Unimplemented => ErrorKind::NotPossible,
            Code::Internal | Code::DataLoss if std::error::Error::source(status).is_none() => {
                ErrorKind::Internal
            }
            Code::OutOfRange => {
                return Self::BadReply {
                    call,
                    what: "a message that is too large",
                };
            }
            // Statuses that our own side makes of a broken connection, and everything that only one could explain.
            _ => return Self::Gone { call, message },
        };
        Self::Refused { call, kind, message }
    }
}

impl Explain for CallError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Gone { .. } => ErrorKind::WrongState,
            Self::Refused { kind, .. } => *kind,
            Self::Late { .. } => ErrorKind::Internal,
            Self::BadReply { .. } => ErrorKind::BadContent,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Gone { .. } | Self::Late { .. } => {
                vec!["see whether the VM still runs (`offshoot ps -a`) and what its console says (`offshoot logs VM`)"
                    .to_owned()]
            }
            Self::Refused { .. } => Vec::new(),
            Self::BadReply { .. } => {
                vec!["treat the guest as broken or hostile: `offshoot kill VM` ends it".to_owned()]
            }
        }
    }
}

/// A guest's text as it may be shown: bounded, and no escape sequence reaches a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_MESSAGE_CHARS)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_text_cannot_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(printable(&"x".repeat(5000)).len(), MAX_MESSAGE_CHARS);
    }

    #[test]
    fn statuses_become_kinds() {
        let kind = |status| CallError::of("x", &status).kind();
        assert_eq!(kind(Status::not_found("no such path")), ErrorKind::NotFound);
        assert_eq!(
            kind(Status::failed_precondition("not a folder")),
            ErrorKind::WrongState
        );
        assert_eq!(
            kind(Status::invalid_argument("relative")),
            ErrorKind::InvalidRequest
        );
        assert!(matches!(
            CallError::of("x", &Status::unavailable("gone")),
            CallError::Gone { .. }
        ));
        assert!(matches!(
            CallError::of("x", &Status::out_of_range("large")),
            CallError::BadReply { .. }
        ));
    }
}
