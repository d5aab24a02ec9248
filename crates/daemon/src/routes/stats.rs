//! What running VMs take.

use axum::Json;
use axum::extract::{Path, State};
use offshoot_api::stats::VmStats;
use offshoot_model::ErrorKind;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::blocking::blocking;
use crate::error::{Answer, Failure};
use crate::stats::{Traffic, stats};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(all)).routes(routes!(one))
}

#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = [VmStats])))]
async fn all(State(app): State<Shared>) -> Answer<Json<Vec<VmStats>>> {
    let handles = app.engine.list();
    let stats = blocking("the count", move || {
        let traffic = Traffic::read(app.engine.networks().namespace());
        let running = handles.iter().filter_map(|handle| {
            let vm = handle.view.borrow().clone();
            vm.life
                .state
                .has_vmm()
                .then(|| stats(&vm, &handle.paths, &traffic))
        });
        Ok(running.collect())
    });
    Ok(Json(stats.await?))
}

#[utoipa::path(get, path = "/v1/vms/{vm}/stats", params(("vm" = String, Path)),
    responses((status = 200, body = VmStats), (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn one(State(app): State<Shared>, Path(name): Path<String>) -> Answer<Json<VmStats>> {
    let handle = app.engine.find(&name)?;
    let vm = handle.view.borrow().clone();
    if !vm.life.state.has_vmm() {
        let said = format!("cannot tell what VM `{}` takes: it is {}", vm.name, vm.life.state);
        return Err(Failure::new(ErrorKind::WrongState, said)
            .hint(format!("start it with `offshoot start {}`", vm.name)));
    }
    let stats = blocking("the count", move || {
        let traffic = Traffic::read(app.engine.networks().namespace());
        Ok(stats(&vm, &handle.paths, &traffic))
    });
    Ok(Json(stats.await?))
}
