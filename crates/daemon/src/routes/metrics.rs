//! `metrics`: numbers as Prometheus reads them.

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::prometheus::MEDIA_TYPE;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// These numbers and nothing else.
pub fn alone(app: Shared) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(app)
}

#[utoipa::path(get, path = "/metrics",
    responses((status = 200, content_type = "text/plain", body = String)))]
async fn metrics(State(app): State<Shared>) -> Response {
    ([(CONTENT_TYPE, MEDIA_TYPE)], app.numbers.scrape(&app).await).into_response()
}
