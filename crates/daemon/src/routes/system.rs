//! The daemon itself: what it is, what is wrong with its host, what everything takes, and what can go.

use axum::Json;
use axum::extract::State;
use offshoot_api::prune::{PruneQuery, PruneReport};
use offshoot_api::system::{DoctorReport, SystemInfo, VmmSummary};
use offshoot_api::usage::DiskUsage;
use offshoot_model::{Finding, Severity};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::Answer;
use crate::extract::Query;
use crate::{sweep, usage};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(info))
        .routes(routes!(doctor))
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
        data_dir: app.data_dir.display().to_string(),
        run_dir: app.run_dir.display().to_string(),
        pid: std::process::id(),
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

#[utoipa::path(get, path = "/v1/system/doctor", responses((status = 200, body = DoctorReport)))]
async fn doctor(State(app): State<Shared>) -> Answer<Json<DoctorReport>> {
    let mut findings = app.engine.check().await;
    let integrity = app.engine.db().call(offshoot_store::db::Db::integrity).await?;
    findings.push(Finding {
        capability: "database".into(),
        severity: if integrity == "ok" {
            Severity::Ok
        } else {
            Severity::Failure
        },
        message: format!("integrity check: {integrity}"),
        hint: if integrity == "ok" {
            String::new()
        } else {
            "restore the database from a backup".into()
        },
    });
    Ok(Json(DoctorReport { findings }))
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
