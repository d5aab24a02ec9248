//! What is wrong with the host, and mending it.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use offshoot_api::doctor::{DoctorFixReport, DoctorReport};
use offshoot_api::progress::Line;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::{doctor, long_work};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(check)).routes(routes!(fix))
}

#[utoipa::path(get, path = "/v1/system/doctor", responses((status = 200, body = DoctorReport)))]
async fn check(State(app): State<Shared>) -> Json<DoctorReport> {
    Json(DoctorReport {
        findings: doctor::report(&app).await,
    })
}

#[utoipa::path(post, path = "/v1/system/doctor/fix",
    responses((status = 200, content_type = "application/x-ndjson", body = Line<DoctorFixReport>)))]
async fn fix(State(app): State<Shared>) -> Response {
    long_work::answer(|progress| async move { doctor::mend(&app, &progress).await })
}
