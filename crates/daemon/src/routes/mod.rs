//! The HTTP API: one module a resource. Handlers translate; they decide nothing.

mod archive;
mod exec;
mod images;
mod kernels;
mod logs;
mod session;
mod system;
mod vms;

use axum::Json;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::routing::get;
use offshoot_model::ErrorKind;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::app::Shared;
use crate::error::Failure;

#[derive(OpenApi)]
#[openapi(info(title = "Offshoot", description = "Virtual machines from OCI images."))]
struct Document;

/// The largest JSON body: a VM's request with a long environment.
const MAX_BODY: usize = 2 << 20;

/// Every route, and the document that describes them.
pub fn router(app: Shared) -> axum::Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(vms::routes())
        .merge(logs::routes())
        .merge(session::routes())
        .merge(exec::routes())
        .merge(archive::routes())
        .merge(images::routes())
        .merge(kernels::routes())
        .merge(system::routes())
        .split_for_parts();
    router
        .route("/openapi.json", get(|| async { Json(document) }))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(app)
}

async fn nowhere(uri: Uri) -> Failure {
    let path: String = uri.path().chars().take(200).collect();
    Failure::new(ErrorKind::NotFound, format!("there is nothing at `{path}`")).hint("see GET /openapi.json")
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let path: String = uri.path().chars().take(200).collect();
    Failure::new(
        ErrorKind::InvalidRequest,
        format!("`{path}` does not take {method}"),
    )
    .hint("see GET /openapi.json")
}
