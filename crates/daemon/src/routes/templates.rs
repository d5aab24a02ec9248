//! Templates: list, remove. They are made by themselves.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use offshoot_api::template::{TemplateOf, TemplatePath, TemplateSummary};
use offshoot_engine::templates::TemplateInfo;
use offshoot_model::TemplateId;
use offshoot_rootfs::base::base_id;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::error::{Answer, Failure};
use crate::extract::Named;
use crate::sweep::unreadable_templates;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(remove))
}

fn summary(app: &App, images: &[(String, offshoot_model::BaseId)], found: TemplateInfo) -> TemplateSummary {
    let vms = app
        .engine
        .records()
        .iter()
        .filter(|vm| vm.runs_from(&found.id))
        .count();
    let (of, problem) = match found.stored {
        Ok(stored) => {
            let key = &stored.manifest.key;
            let of = TemplateOf {
                images: images
                    .iter()
                    .filter(|(_, base)| *base == key.base)
                    .map(|(name, _)| name.clone())
                    .collect(),
                base: key.base.clone(),
                kernel: key.kernel.clone(),
                vmm: format!("{} {}", key.vmm, key.vmm_version),
                cpus: key.cpus,
                memory: key.memory_mib << 20,
                root: key.root.clone(),
                network: key.network,
                created_ms: stored.manifest.created_ms,
                used_ms: stored.used_ms,
            };
            (Some(of), found.stale)
        }
        Err(problem) => (None, Some(problem)),
    };
    TemplateSummary {
        id: found.id,
        of,
        problem,
        vms: vms as u64,
        disk_bytes: found.disk.bytes(),
        memory_bytes: found.held.bytes(),
    }
}

#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = [TemplateSummary])))]
async fn list(State(app): State<Shared>) -> Answer<Json<Vec<TemplateSummary>>> {
    let Some(templates) = app.engine.templates() else {
        return Ok(Json(Vec::new()));
    };
    let templates = Arc::clone(templates);
    templates.look_at_vmms().await;
    let found = tokio::task::spawn_blocking(move || templates.list()).await;
    let found = found
        .map_err(|_| Failure::broken("looking at templates"))?
        .map_err(|error| unreadable_templates(&error))?;
    let rows = app.engine.db().call(offshoot_store::db::Db::images).await?;
    let images: Vec<_> = rows
        .iter()
        .map(|row| (crate::images::short(&row.reference), base_id(&row.digest)))
        .collect();
    let all = found.into_iter().map(|found| summary(&app, &images, found));
    Ok(Json(all.collect()))
}

#[utoipa::path(delete, path = "/v1/templates/{id}", params(TemplatePath), responses((status = 204)))]
async fn remove(State(app): State<Shared>, Named(id): Named<TemplateId>) -> Answer<StatusCode> {
    let templates = app
        .engine
        .templates()
        .ok_or_else(|| Failure::broken("the store of templates"))?;
    // VMs that were restored from it keep what they have: it is their own memory by now.
    templates.remove(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
