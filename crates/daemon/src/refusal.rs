//! A request that is refused before any handler sees it: with the HTTP status that says why, and in the one error shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use offshoot_api::error::ApiError;
use offshoot_model::{ErrorKind, Explain};

/// Why a request is refused as such.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    error: ApiError,
}

impl Refusal {
    /// A request that is wrong in itself.
    pub fn new(status: StatusCode, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            status,
            error: ApiError::new(ErrorKind::InvalidRequest, message).hint(hint),
        }
    }

    /// A request for something that is not there (404).
    pub fn nowhere(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            error: ApiError::new(ErrorKind::NotFound, message).hint(hint),
        }
    }

    /// A request that has come at a bad time (503).
    pub fn busy(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            error: ApiError::new(ErrorKind::NoSpace, message).hint(hint),
        }
    }

    /// Our own fault (500): the log has it.
    pub fn broken(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            error: ApiError::new(ErrorKind::Internal, message).hint("look at the daemon's log"),
        }
    }

    /// Something in the request that is not what it should be, in its own words.
    pub fn explained(error: &dyn Explain) -> Self {
        let error = ApiError::from_explained(error);
        Self {
            status: StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::BAD_REQUEST),
            error,
        }
    }

    /// The whole answer as bytes, where there is no HTTP to write it. It ends the connection.
    pub fn to_http(&self) -> Vec<u8> {
        let body = serde_json::to_vec(&self.error).unwrap_or_default();
        let mut answer = format!(
            "HTTP/1.1 {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            self.status,
            body.len()
        )
        .into_bytes();
        answer.extend_from_slice(&body);
        answer
    }
}

impl IntoResponse for Refusal {
    fn into_response(mut self) -> Response {
        self.error.operation = offshoot_engine::operation::current().map(String::from);
        let mut response = (self.status, Json(self.error)).into_response();
        if matches!(
            self.status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::REQUEST_TIMEOUT
        ) {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }
}
