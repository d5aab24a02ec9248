//! The daemon itself: what it is, what everything takes, and what can go.

use axum::Json;
use axum::extract::State;
use offshoot_api::prune::{PruneQuery, PruneReport};
use offshoot_api::system::{SystemInfo, VmmSummary};
use offshoot_api::usage::DiskUsage;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::Answer;
use crate::extract::Query;
use crate::{sweep, usage};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(info))
        .routes(routes!(df))
        .routes(routes!(preview, prune))
}

#[utoipa::path(get, path = "/v1/system/info", responses((status = 200, body = SystemInfo)))]
async fn info(State(app): State<Shared>) -> Answer<Json<SystemInfo>> {
    let mut vmms = Vec::new();
    for driver in app.drivers.values() {
        if let Ok(facts) = driver.probe().await {
            let word = |feature| serde_json::to_value(feature).ok()?.as_str().map(str::to_owned);
            vmms.push(VmmSummary {
                name: facts.kind,
                version: facts.version,
                path: facts.program.display().to_string(),
                features: facts.features.iter().filter_map(word).collect(),
            });
        }
    }
    let vms = app.engine.list();
    let probe = &app.accelerator.probe;
    let kvm = match (probe.native, probe.present, probe.permitted) {
        (true, ..) => "native",
        (_, false, _) => "absent",
        (_, _, false) => "denied",
        _ => "emulated",
    };
    Ok(Json(SystemInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        api_version: offshoot_api::API_VERSION.into(),
        data_dir: app.data_dir.display().to_string(),
        run_dir: app.run_dir.display().to_string(),
        socket: app.socket.display().to_string(),
        config_file: app.config_file.as_ref().map(|path| path.display().to_string()),
        pid: std::process::id(),
        started_ms: app.started.0,
        uptime_s: app.started.1.elapsed().as_secs(),
        kvm: kvm.into(),
        kvm_explanation: probe.explanation.clone(),
        vmms,
        vms: vms.len() as u64,
        running: vms
            .iter()
            .filter(|handle| handle.view.borrow().life.state.has_vmm())
            .count() as u64,
        images: app.images.list().await?.len() as u64,
    }))
}

#[utoipa::path(get, path = "/v1/system/df", responses((status = 200, body = DiskUsage)))]
async fn df(State(app): State<Shared>) -> Answer<Json<DiskUsage>> {
    Ok(Json(usage::usage(&app.images, &app.kernels).await?))
}

#[utoipa::path(get, path = "/v1/system/prune", params(PruneQuery),
    responses((status = 200, body = PruneReport)))]
async fn preview(State(app): State<Shared>, Query(query): Query<PruneQuery>) -> Answer<Json<PruneReport>> {
    Ok(Json(sweep::preview(&app.images, &app.kernels, query).await?))
}

#[utoipa::path(post, path = "/v1/system/prune", params(PruneQuery),
    responses((status = 200, body = PruneReport), (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn prune(State(app): State<Shared>, Query(query): Query<PruneQuery>) -> Answer<Json<PruneReport>> {
    Ok(Json(sweep::prune(&app.images, &app.kernels, query).await?))
}
