//! Every error as the one wire form.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use offshoot_api::error::ApiError;
use offshoot_model::{ErrorKind, Explain};

/// An error on its way to a client.
#[derive(Debug)]
pub struct Failure(pub ApiError);

/// What a handler gives.
pub type Answer<T> = Result<T, Failure>;

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(ApiError::from_explained(&error))
    }
}

impl Failure {
    /// An error of our own with no cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(ApiError::new(kind, message))
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self(self.0.hint(hint))
    }

    /// Work that panicked or was aborted: our own fault, and the log has it.
    pub fn broken(what: &str) -> Self {
        Self::new(ErrorKind::Internal, format!("{what} broke off")).hint("look at the daemon's log")
    }
}

/// An error and its causes in one line.
pub fn chain(error: &impl Explain) -> String {
    let ApiError { message, causes, .. } = ApiError::from_explained(error);
    [vec![message], causes].concat().join(": ")
}

impl Failure {
    /// The error with the operation that it belongs to.
    #[must_use]
    pub fn of_this_operation(mut self) -> Self {
        let current = offshoot_engine::operation::current();
        self.0.operation = self.0.operation.or(current.map(String::from));
        self
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let this = self.of_this_operation();
        let status = StatusCode::from_u16(this.0.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(error = ?this.0, "a request failed");
        }
        (status, Json(this.0)).into_response()
    }
}
