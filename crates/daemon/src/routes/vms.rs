//! VMs: create, list, start, stop, remove.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use offshoot_api::vm::{
    Decision, KillQuery, ListQuery, PassedOver, RemoveQuery, RenameQuery, ResetQuery, Sessions, StopQuery,
    VmDetails, VmPath, VmSummary, WaitAnswer,
};
use offshoot_engine::capabilities::check_source;
use offshoot_engine::definition::{Choice, VmRecord};
use offshoot_engine::engine::CreateRequest;
use offshoot_engine::operation::{Stages, Subject};
use offshoot_engine::owner::{Request, VmHandle};
use offshoot_engine::ssh_keys::check_keys;
use offshoot_kernel::KernelBundle;
use offshoot_model::{ErrorKind, Progress, StageTiming, VmConfig, VmId, VmName, VmState};
use offshoot_store::db::OperationFilter;
use tokio::sync::OwnedRwLockReadGuard;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::choose;
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Named, Query};

/// Seconds that a guest gets when the client names none, as Docker has it.
const STOP_TIME_S: u32 = 10;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(inspect, remove))
        .routes(routes!(start))
        .routes(routes!(cancel))
        .routes(routes!(stop))
        .routes(routes!(restart))
        .routes(routes!(kill))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(reset))
        .routes(routes!(rename))
        .routes(routes!(wait))
}

/// What `ps` shows of a record.
pub(super) fn summary(vm: &VmRecord) -> VmSummary {
    VmSummary {
        id: vm.id.clone(),
        name: vm.name.clone(),
        image: vm.definition.config.image.clone(),
        command: vm
            .definition
            .process
            .as_ref()
            .map(|process| quote(&process.argv))
            .unwrap_or_default(),
        state: vm.life.state,
        created_ms: vm.created_ms,
        started_ms: vm.life.started_ms,
        finished_ms: vm.life.finished_ms,
        exit: vm.life.exit,
        degraded: vm.life.degraded.clone(),
        network: vm.definition.attachment.as_ref().map(Into::into),
        ports: vm
            .definition
            .attachment
            .as_ref()
            .map(|attachment| attachment.publish.clone())
            .unwrap_or_default(),
        sessions: Sessions {
            ssh: vm.life.sessions.ssh,
            exec: vm.life.sessions.exec,
        },
    }
}

/// Words as a shell would read them back.
fn quote(argv: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let words = argv.iter().map(|word| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[utoipa::path(post, path = "/v1/vms", request_body = VmConfig,
    responses((status = 201, body = VmSummary)))]
async fn create(
    State(app): State<Shared>,
    JsonBody(config): JsonBody<VmConfig>,
) -> Answer<(StatusCode, Json<VmSummary>)> {
    config
        .validate()
        .map_err(offshoot_engine::error::VmError::Config)?;
    if let Some(name) = &config.name
        && app
            .engine
            .find(name.as_str())
            .is_ok_and(|vm| vm.view.borrow().name.as_str().eq_ignore_ascii_case(name.as_str()))
    {
        return Err(offshoot_store::db::DbError::NameTaken {
            name: name.to_string(),
        }
        .into());
    }
    for mount in &config.mounts {
        check_source(mount)?;
    }
    check_keys(&config.ssh.keys)?;
    let subject = Subject::named(config.image.clone());
    let mut stages = app.engine.operations().begin("create", subject);
    let (request, lease) = ready_to_create(&app, config, &mut stages).await?;
    let handle = app.engine.create_within(request, stages).await?;
    drop(lease);
    let vm = handle.view.borrow().clone();
    Ok((StatusCode::CREATED, Json(summary(&vm))))
}

/// Decides all that is left to decide of a VM, and makes what its image lacks; what it needs is there as long as the lease is.
pub async fn ready_to_create(
    app: &Shared,
    config: VmConfig,
    stages: &mut Stages,
) -> Answer<(CreateRequest, OwnedRwLockReadGuard<()>)> {
    let choices = async {
        // What is no reference, or names no image, is told before what this host lacks.
        app.images.row(&config.image).await?;
        let vms = app.engine.list().len() as u64;
        app.admission
            .admit_creation(config.memory, vms, app.config.uid_count)?;
        let kernel = kernel_of(app, &config)?;
        let vmm = choose::vmm(app, &config, &kernel).await?;
        // Refused before anything is made; chosen when it is known how large the root is.
        choose::root(app, &config, &vmm, &kernel, None).await?;
        Answer::Ok(vmm)
    };
    let vmm = stages.stage("choose", choices).await?;
    let (images, image) = (app.images.clone(), config.image.clone());
    let ready = stages
        .stage_with_tasks("image", &Progress::silent(), |progress| async move {
            images.ready(&image, &progress).await
        })
        .await?;
    // Again, and for good: the lease of what is ready keeps away whoever would delete it.
    let kernel = kernel_of(app, &config)?;
    let root = choose::root(app, &config, &vmm, &kernel, Some(ready.root_size));
    let root = stages.stage("root", root).await?;
    choose::refuse_boot(&config, &root)?;
    let request = CreateRequest {
        image_config: ready.image.config.clone(),
        image_digest: ready.image.digest,
        base_id: ready.base.clone(),
        kernel_id: kernel.id,
        vmm,
        root,
        config,
    };
    Ok((request, ready.lease))
}

/// The kernel bundle that was asked for, or the default one.
fn kernel_of(app: &App, config: &VmConfig) -> Answer<KernelBundle> {
    Ok(match &config.kernel {
        Some(id) => app.kernels.get(id)?,
        None => app.kernels.default()?,
    })
}

#[utoipa::path(get, path = "/v1/vms", params(ListQuery), responses((status = 200, body = [VmSummary])))]
async fn list(State(app): State<Shared>, Query(query): Query<ListQuery>) -> Json<Vec<VmSummary>> {
    let vms = app.engine.records();
    let shown = vms.iter().filter(|vm| query.all || vm.life.state.has_vmm());
    Json(shown.map(|vm| summary(vm)).collect())
}

#[utoipa::path(get, path = "/v1/vms/{vm}", params(VmPath),
    responses((status = 200, body = VmDetails)))]
async fn inspect(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<VmDetails>> {
    let handle = app.engine.find(name.as_str())?;
    let vm = handle.view.borrow().clone();
    let id = vm.id.clone();
    let timings = last_timings(&app, id).await?;
    let decision = |choice: &Choice| Decision {
        chosen: choice.chosen.clone(),
        reasons: choice.reasons.clone(),
        passed_over: choice
            .passed_over
            .iter()
            .map(|other| PassedOver {
                name: other.name.clone(),
                reason: other.reason.clone(),
            })
            .collect(),
    };
    let disk_bytes = if handle.paths.data().exists() {
        offshoot_sys::space::disk_usage(handle.paths.data()).unwrap_or(0)
    } else {
        0
    };
    Ok(Json(VmDetails {
        summary: summary(&vm),
        config: vm.definition.config.clone(),
        image_digest: vm.image_digest.to_string(),
        base: vm.base_id.to_string(),
        kernel: vm.kernel_id.to_string(),
        process: vm.definition.process.clone(),
        vmm: decision(&vm.definition.vmm),
        root: decision(&vm.definition.root),
        boot: vm.life.boot.as_ref().map(|boot| decision(&boot.choice)),
        pid: vm.life.machine.as_ref().map(|machine| machine.process.pid as i32),
        failure: vm.life.failure.clone(),
        directory: handle.paths.data().display().to_string(),
        disk_bytes,
        timings,
    }))
}

/// The stages of a VM's last operation of each kind.
async fn last_timings(app: &App, id: VmId) -> Answer<Vec<StageTiming>> {
    let filter = OperationFilter {
        vm_id: Some(id),
        ..OperationFilter::default()
    };
    let kept = app
        .engine
        .operations()
        .read(filter, super::operations::MOST)
        .await?;
    let is_last = |at: usize| kept[at + 1..].iter().all(|later| later.kind != kept[at].kind);
    let last = (0..kept.len()).filter(|at| is_last(*at));
    Ok(last.flat_map(|at| kept[at].stages.clone()).collect())
}

#[utoipa::path(delete, path = "/v1/vms/{vm}", params(VmPath, RemoveQuery),
    responses((status = 204)))]
async fn remove(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<RemoveQuery>,
) -> Answer<StatusCode> {
    app.engine
        .find(name.as_str())?
        .ask(Request::Remove(query.force))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn ask(app: &App, name: &VmName, request: Request) -> Answer<Json<VmSummary>> {
    let vm = app.engine.find(name.as_str())?.ask(request).await?;
    Ok(Json(summary(&vm)))
}

fn stop_time(query: &StopQuery) -> Duration {
    Duration::from_secs(query.time_s.unwrap_or(STOP_TIME_S).into())
}

#[utoipa::path(post, path = "/v1/vms/{vm}/start", params(VmPath),
    responses((status = 200, body = VmSummary)))]
async fn start(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Start).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/cancel", params(VmPath),
    responses((status = 200, body = VmSummary)))]
async fn cancel(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Cancel).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/stop", params(VmPath, StopQuery),
    responses((status = 200, body = VmSummary)))]
async fn stop(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<StopQuery>,
) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Stop(stop_time(&query))).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/restart", params(VmPath, StopQuery),
    responses((status = 200, body = VmSummary)))]
async fn restart(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<StopQuery>,
) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Restart(stop_time(&query))).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/kill", params(VmPath, KillQuery),
    responses((status = 200, body = VmSummary)))]
async fn kill(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<KillQuery>,
) -> Answer<Json<VmSummary>> {
    let request = match query.signal.as_deref() {
        None => Request::Kill,
        Some(text) => match offshoot_sys::signal::parse(text) {
            Some(offshoot_sys::signal::KILL) => Request::Kill,
            Some(signal) => Request::Signal(signal),
            None => {
                let shown: String = text.chars().take(40).flat_map(char::escape_debug).collect();
                return Err(
                    Failure::new(ErrorKind::InvalidRequest, format!("no such signal: `{shown}`"))
                        .hint("see `kill -l` for names and numbers"),
                );
            }
        },
    };
    ask(&app, &name, request).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/pause", params(VmPath),
    responses((status = 200, body = VmSummary)))]
async fn pause(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Pause).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/resume", params(VmPath),
    responses((status = 200, body = VmSummary)))]
async fn resume(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Resume).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/reset", params(VmPath, ResetQuery),
    responses((status = 200, body = VmSummary)))]
async fn reset(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<ResetQuery>,
) -> Answer<Json<VmSummary>> {
    ask(&app, &name, Request::Reset(query.force)).await
}

#[utoipa::path(post, path = "/v1/vms/{vm}/rename", params(VmPath, RenameQuery),
    responses((status = 200, body = VmSummary)))]
async fn rename(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<RenameQuery>,
) -> Answer<Json<VmSummary>> {
    let new: VmName = query.name.parse()?;
    ask(&app, &name, Request::Rename(new)).await
}

#[utoipa::path(get, path = "/v1/vms/{vm}/wait", params(VmPath),
    responses((status = 200, body = WaitAnswer)))]
async fn wait(State(app): State<Shared>, Named(name): Named<VmName>) -> Answer<Json<WaitAnswer>> {
    let handle = app.engine.find(name.as_str())?;
    Ok(Json(WaitAnswer {
        exit: ended(&handle).await.life.exit,
    }))
}

/// The record once the VM does not run any more.
pub(super) async fn ended(handle: &VmHandle) -> std::sync::Arc<VmRecord> {
    let mut view = handle.view.clone();
    let ended = view
        .wait_for(|vm| !vm.life.state.has_vmm())
        .await
        .map(|vm| vm.clone());
    // The owner is gone: the VM was removed, and its last state stands.
    ended.unwrap_or_else(|_| handle.view.borrow().clone())
}

/// The VM, when it runs and can be entered.
pub(super) fn live(handle: &VmHandle) -> Answer<offshoot_engine::run::Live> {
    use offshoot_engine::request::{RequestKind, Verdict, decide};
    let vm = handle.view.borrow().clone();
    if let Verdict::Refuse(hint) = decide(vm.life.state, RequestKind::Session) {
        return Err(offshoot_engine::error::VmError::WrongState {
            name: vm.name.clone(),
            state: vm.life.state.as_str(),
            request: RequestKind::Session,
            hint: hint.replace("{}", vm.name.as_str()),
        }
        .into());
    }
    handle.live.borrow().clone().ok_or_else(|| {
        offshoot_engine::error::VmError::NoAgent {
            name: vm.name.clone(),
            operation: "enter",
        }
        .into()
    })
}

/// Whether a VM in `state` can still write something.
pub(super) fn may_write(state: VmState) -> bool {
    state.has_vmm()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_a_shell_reads_them() {
        let words = |w: &[&str]| w.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(quote(&words(&["ls", "-l", "/a b"])), "ls -l '/a b'");
        assert_eq!(quote(&words(&["sh", "-c", "it's"])), r"sh -c 'it'\''s'");
        assert_eq!(quote(&words(&[""])), "''");
    }
}
