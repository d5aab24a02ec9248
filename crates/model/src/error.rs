//! What every error of ours can say about itself besides its message.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of trouble an error is, for HTTP statuses and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request makes no sense on any host.
    InvalidRequest,
    /// What it names does not exist.
    NotFound,
    /// It exists already, or is in use.
    Conflict,
    /// The state of the VM does not allow it.
    WrongState,
    /// This host or this build lacks something.
    NotPossible,
    /// Bytes from outside are damaged or hostile.
    BadContent,
    /// A limit or the disk is full.
    NoSpace,
    /// A registry, a mirror or another peer failed.
    Upstream,
    /// It was cancelled.
    Cancelled,
    /// Our own trouble, or the operating system's.
    Internal,
}

/// An error that knows its kind and what the user can do.
pub trait Explain: std::error::Error {
    /// What kind of trouble it is.
    fn kind(&self) -> ErrorKind;

    /// What to do about it, each naming a command or a path; empty when there is nothing to say.
    fn hints(&self) -> Vec<String>;

    /// The status a client should end with because a command would have (126, 127), when the error decides that.
    fn exit_status(&self) -> Option<i32> {
        None
    }
}
