//! The daemon itself: what it is, what everything takes, and what can go.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use offshoot_api::prune::{PruneQuery, PruneReport};
use offshoot_api::system::{ShutdownRequest, SystemInfo, TapPool, VmmSummary};
use offshoot_api::usage::DiskUsage;
use offshoot_model::ErrorKind;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Query};
use crate::{sweep, usage};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(info))
        .routes(routes!(shut_down))
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
    let taps = app.engine.networks().taps().facts();
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
        tap_pool: TapPool {
            size: taps.size as u64,
            ready: taps.ready as u64,
            wanted: taps.wanted as u64,
        },
    }))
}

#[utoipa::path(post, path = "/v1/system/shutdown", request_body = ShutdownRequest,
    responses((status = 204), (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn shut_down(
    State(app): State<Shared>,
    JsonBody(request): JsonBody<ShutdownRequest>,
) -> Answer<StatusCode> {
    let pid = std::process::id();
    if request.pid != pid {
        return Err(Failure::new(
            ErrorKind::Conflict,
            format!("this daemon is process {pid}, not {}", request.pid),
        )
        .hint("ask `offshoot system info` again"));
    }
    if request.drain {
        app.engine.end_slots().await;
        app.engine.networks().drain().await?;
    }
    tracing::info!(drain = request.drain, "a client asks the daemon to end");
    app.end.cancel();
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(get, path = "/v1/system/df", responses((status = 200, body = DiskUsage)))]
async fn df(State(app): State<Shared>) -> Answer<Json<DiskUsage>> {
    Ok(Json(usage::usage(&app.images, &app.kernels).await?))
}

/// Whose templates can go is a matter of which VMMs there are.
async fn look_at_vmms(app: &Shared) {
    if let Some(templates) = app.engine.templates() {
        templates.look_at_vmms().await;
    }
}

#[utoipa::path(get, path = "/v1/system/prune", params(PruneQuery),
    responses((status = 200, body = PruneReport)))]
async fn preview(State(app): State<Shared>, Query(query): Query<PruneQuery>) -> Answer<Json<PruneReport>> {
    look_at_vmms(&app).await;
    Ok(Json(sweep::preview(&app.images, &app.kernels, query).await?))
}

#[utoipa::path(post, path = "/v1/system/prune", params(PruneQuery),
    responses((status = 200, body = PruneReport), (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn prune(State(app): State<Shared>, Query(query): Query<PruneQuery>) -> Answer<Json<PruneReport>> {
    if query.all {
        app.warm.clear();
    }
    look_at_vmms(&app).await;
    Ok(Json(sweep::prune(&app.images, &app.kernels, query).await?))
}
