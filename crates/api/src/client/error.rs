//! What can go wrong between a client and the daemon.

use std::io;
use std::path::PathBuf;

use offshoot_model::{ErrorKind, Explain};
use tokio_tungstenite::tungstenite;

use crate::error::ApiError;
use crate::log_frame::FrameError;

/// Why a request had no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the socket, or it may not be opened.
    #[error("cannot reach the daemon at `{}`", .socket.display())]
    Unreachable {
        /// Where the client tried.
        socket: PathBuf,
        /// The group that may open it, where that is not root's.
        group: Option<String>,
        /// What the operating system said.
        source: io::Error,
    },
    /// The daemon answered with an error.
    #[error(transparent)]
    Api(ApiError),
    /// The conversation itself broke.
    #[error("cannot understand or finish the daemon's answer to `{request}`")]
    Protocol {
        /// Method and path.
        request: String,
        /// How.
        source: ProtocolError,
    },
}

/// How a conversation with the daemon broke.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The connection ended, or is not HTTP.
    #[error("the connection broke")]
    Connection(#[source] hyper::Error),
    /// What should be sent could not be read.
    #[error("cannot send the body")]
    Upload(#[source] hyper::Error),
    /// The request cannot be written as HTTP.
    #[error("the request is not valid HTTP")]
    Request(#[source] http::Error),
    /// The answer is not the JSON that this client knows.
    #[error("the answer is not the JSON that this version knows")]
    Json(#[source] serde_json::Error),
    /// The answer, or one line of it, is longer than any real one.
    #[error("the answer is longer than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// The answer ended before its result.
    #[error("the answer ended before its result")]
    CutOff,
    /// An error without the daemon's description of it.
    #[error("HTTP status {status} without a description")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// A header that must be there is missing or broken.
    #[error("header `{name}` is missing or broken")]
    Header {
        /// Its name.
        name: &'static str,
    },
    /// The log stream is broken.
    #[error("the log stream is broken")]
    Frame(#[source] FrameError),
    /// The WebSocket broke.
    #[error("the session broke")]
    WebSocket(#[source] Box<tungstenite::Error>),
    /// A session message of no known channel.
    #[error("message on unknown channel {channel}")]
    Channel {
        /// The channel byte.
        channel: u8,
    },
}

impl ClientError {
    /// The kind and text of the error in the one shape that is printed.
    pub fn to_api(&self) -> ApiError {
        match self {
            Self::Api(error) => error.clone(),
            other => ApiError::from_explained(other),
        }
    }

    /// Whether the daemon said that something is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(error) if error.kind == ErrorKind::NotFound)
    }
}

impl Explain for ClientError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreachable { .. } => ErrorKind::NotPossible,
            Self::Api(error) => error.kind,
            Self::Protocol { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Unreachable { source, group, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                vec![match group {
                    Some(group) => format!(
                        "join the group `{group}`, which may use the daemon: `sudo usermod -aG {group} $USER`, then log in again; \
                         or run this as root"
                    ),
                    None => "run this as root, or give the socket to a group (`socket_group` in the daemon's config): \
                             `sudo groupadd --system offshoot`, restart `offshootd`, `sudo usermod -aG offshoot $USER`, \
                             and log in again"
                        .to_owned(),
                }]
            }
            Self::Unreachable { .. } => vec![
                "start the daemon: `offshootd`, or name its socket with `--socket` or OFFSHOOT_SOCKET"
                    .to_owned(),
            ],
            Self::Api(error) => error.hints.clone(),
            Self::Protocol {
                source: ProtocolError::Connection(_) | ProtocolError::CutOff,
                ..
            } => {
                vec!["look whether `offshootd` still runs: `offshoot system info`".to_owned()]
            }
            Self::Protocol {
                source: ProtocolError::Upload(_),
                ..
            } => Vec::new(),
            Self::Protocol { .. } => {
                vec!["compare the versions of client and daemon: `offshoot version`".to_owned()]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_let_in_learns_how_to_get_in() {
        let hint = |group: Option<&str>, kind: io::ErrorKind| {
            let error = ClientError::Unreachable {
                socket: "/run/offshoot/api.sock".into(),
                group: group.map(str::to_owned),
                source: kind.into(),
            };
            error.hints().join("\n")
        };
        let denied = hint(Some("vmusers"), io::ErrorKind::PermissionDenied);
        assert!(denied.contains("`sudo usermod -aG vmusers $USER`"), "{denied}");
        let denied = hint(None, io::ErrorKind::PermissionDenied);
        assert!(
            denied.contains("root") && denied.contains("socket_group"),
            "{denied}"
        );
        assert!(hint(None, io::ErrorKind::NotFound).contains("start the daemon"));
    }
}
