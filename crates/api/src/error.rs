//! The one shape of every error that leaves the daemon.

use offshoot_model::{ErrorKind, Explain};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What every response with a status of 400 or more holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind of trouble.
    pub kind: ErrorKind,
    /// What could not be done, one line in lower case.
    pub message: String,
    /// Why, from the nearest cause to the last one.
    pub causes: Vec<String>,
    /// What to do about it; each names a command or a path.
    pub hints: Vec<String>,
    /// What the client should end with, when the failure is that of a command (126, 127).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<i32>,
    /// The operation that failed, as the daemon's log and `offshoot events` name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
}

impl ApiError {
    /// An error with no cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
            exit_status: None,
            operation: None,
        }
    }

    /// The same error with one more hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The wire form of a library's error: its message, its chain of sources, its hints.
    pub fn from_explained(error: &dyn Explain) -> Self {
        let mut causes: Vec<String> = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Some libraries repeat the cause in their message.
            if !causes.last().is_some_and(|last| last.ends_with(&text)) {
                causes.push(text);
            }
            source = cause.source();
        }
        Self {
            kind: error.kind(),
            message: error.to_string(),
            causes,
            hints: error.hints(),
            exit_status: error.exit_status(),
            operation: None,
        }
    }

    /// The HTTP status that goes with the kind.
    pub fn http_status(&self) -> u16 {
        match self.kind {
            ErrorKind::InvalidRequest => 400,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::WrongState => 409,
            ErrorKind::NotPossible | ErrorKind::BadContent => 422,
            ErrorKind::NoSpace => 507,
            ErrorKind::Upstream => 502,
            ErrorKind::Cancelled => 499,
            ErrorKind::Internal => 500,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start VM `web`")]
    struct Outer(#[source] std::io::Error);

    impl Explain for Outer {
        fn kind(&self) -> ErrorKind {
            ErrorKind::NotPossible
        }
        fn hints(&self) -> Vec<String> {
            vec!["run `offshoot doctor`".into()]
        }
    }

    #[test]
    fn an_error_keeps_its_chain_and_its_hints() {
        let error = ApiError::from_explained(&Outer(std::io::Error::other("permission denied")));
        assert_eq!(error.message, "cannot start VM `web`");
        assert_eq!(error.causes, ["permission denied"]);
        assert_eq!(error.hints, ["run `offshoot doctor`"]);
        assert_eq!(error.http_status(), 422);
    }
}
