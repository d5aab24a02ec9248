//! One id for everything that a request sets off: its log lines, events, errors, and a header of the answer.

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use offshoot_engine::operation;
use tracing::Instrument as _;

/// The header of every answer that names its operation.
pub const HEADER: &str = "x-offshoot-operation";

/// Handles a request as an operation of its own.
pub async fn as_operation(request: Request, next: Next) -> Response {
    let id = operation::new_id();
    let path: String = request.uri().path().chars().take(200).collect();
    let span = tracing::info_span!("request", op = %id, method = %request.method(), path);
    let mut response = operation::within(id.clone(), next.run(request).instrument(span)).await;
    // Eight hex digits are a header's value.
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}
