//! Operations that are over, with the time that each of their stages took.

use axum::Json;
use axum::extract::State;
use offshoot_api::operation::OperationsQuery;
use offshoot_model::{OperationTiming, VmId, VmName};
use offshoot_store::db::OperationFilter;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::error::Answer;
use crate::extract::Query;

/// So many are given when nobody says how many.
const USUAL: u32 = 100;
/// So many are given at most: about 4 MB.
pub(super) const MOST: u32 = 1000;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(operations))
}

#[utoipa::path(get, path = "/v1/operations", params(OperationsQuery),
    responses((status = 200, body = [OperationTiming])))]
async fn operations(
    State(app): State<Shared>,
    Query(query): Query<OperationsQuery>,
) -> Answer<Json<Vec<OperationTiming>>> {
    let filter = OperationFilter {
        vm_id: query.vm.map(|vm| vm_id(&app, &vm)).transpose()?,
        kind: query.kind,
        operation: query.operation,
    };
    let limit = query.limit.unwrap_or(USUAL).min(MOST);
    Ok(Json(app.engine.operations().read(filter, limit).await?))
}

/// The VM that is meant. One that is gone has no name any more, but its whole id is still good.
fn vm_id(app: &App, name: &VmName) -> Answer<VmId> {
    match app.engine.find(name.as_str()) {
        Ok(vm) => Ok(vm.view.borrow().id.clone()),
        Err(error) => name.as_str().parse().map_err(|_| error.into()),
    }
}
