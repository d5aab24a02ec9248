//! Kernel bundles: list, add, remove, choose.

use std::io::Read;
use std::path::{Path as FilePath, PathBuf};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use futures::StreamExt as _;
use offshoot_api::kernel::{DistroRequest, KernelPath, KernelSummary};
use offshoot_api::progress::Line;
use offshoot_kernel::{DistroOptions, KernelBundle};
use offshoot_model::{ErrorKind, KernelId, Progress};
use offshoot_sys::durable::StagingDir;
use tokio_util::io::{StreamReader, SyncIoBridge};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Named, Upload};
use crate::long_work;

/// The most that a kernel and its modules may unpack to: a full distribution kernel with all modules has under 1 GiB.
const MAX_UNPACKED: u64 = 4 << 30;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(add_distro))
        .routes(routes!(add_files))
        .routes(routes!(remove))
        .routes(routes!(set_default))
}

fn summary(bundle: &KernelBundle, default: Option<&KernelId>) -> KernelSummary {
    let features = &bundle.manifest.features;
    let named = [
        ("block", features.block),
        ("pmem", features.pmem),
        ("virtiofs", features.virtiofs),
        ("net", features.net),
        ("vsock", features.vsock),
    ];
    KernelSummary {
        id: bundle.id.clone(),
        release: bundle.manifest.release.clone(),
        source: bundle.manifest.source.to_string(),
        features: named
            .iter()
            .filter(|(_, has)| *has)
            .map(|(name, _)| (*name).to_owned())
            .collect(),
        created_ms: bundle.manifest.created_unix_ms,
        size: bundle.manifest.vmlinux.size.bytes() + bundle.manifest.initramfs.size.bytes(),
        default: default == Some(&bundle.id),
    }
}

#[utoipa::path(get, path = "/v1/kernels", responses((status = 200, body = [KernelSummary])))]
async fn list(State(app): State<Shared>) -> Answer<Json<Vec<KernelSummary>>> {
    let default = app.kernels.default().ok().map(|bundle| bundle.id);
    Ok(Json(
        app.kernels
            .list()?
            .iter()
            .map(|bundle| summary(bundle, default.as_ref()))
            .collect(),
    ))
}

#[utoipa::path(post, path = "/v1/kernels/distro", request_body = DistroRequest,
    responses((status = 200, content_type = "application/x-ndjson", body = Line<KernelSummary>)))]
async fn add_distro(State(app): State<Shared>, JsonBody(request): JsonBody<DistroRequest>) -> Response {
    long_work::answer(|progress| async move {
        let options = DistroOptions {
            package: request.package,
        };
        let bundle = app.kernels.add_distro(&app.agent, &options, &progress).await?;
        Ok(summary(&bundle, Some(&bundle.id)))
    })
}

#[utoipa::path(post, path = "/v1/kernels/files",
    request_body(content_type = "application/x-tar", content = Vec<u8>),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<KernelSummary>)))]
async fn add_files(State(app): State<Shared>, upload: Upload) -> Response {
    let Upload { pieces, place } = upload;
    let pieces = pieces.map(move |piece| {
        // Held by whoever reads, which goes on for a moment when the work is cancelled.
        let _ = &place;
        piece.map_err(std::io::Error::other)
    });
    let source = SyncIoBridge::new(Box::pin(StreamReader::new(pieces)));
    long_work::answer(|progress| async move {
        let staging = StagingDir::new(app.data_dir.join("tmp"), "kernel-upload").map_err(|error| {
            Failure::new(ErrorKind::Internal, format!("cannot unpack the upload: {error}"))
        })?;
        let into = staging.path().to_owned();
        let unpacked = tokio::task::spawn_blocking(move || unpack(source, &into)).await;
        let files = unpacked.map_err(|_| Failure::broken("unpacking the upload"))??;
        let bundle = add(&app, &files, &progress).await?;
        drop(staging);
        Ok(summary(&bundle, Some(&bundle.id)))
    })
}

struct Files {
    vmlinux: PathBuf,
    modules: Option<PathBuf>,
}

async fn add(app: &App, files: &Files, progress: &Progress) -> Answer<KernelBundle> {
    Ok(app
        .kernels
        .add_files(&files.vmlinux, files.modules.as_deref(), &app.agent, progress)
        .await?)
}

/// Unpacks `vmlinux` and `modules/…`; nothing else, and only files and folders.
fn unpack(source: impl Read, into: &FilePath) -> Answer<Files> {
    let broken = |error: std::io::Error| {
        Failure::new(
            ErrorKind::BadContent,
            format!("cannot unpack the upload: {error}"),
        )
        .hint("use `offshoot kernel add --vmlinux FILE [--modules DIR]`")
    };
    let mut archive = tar::Archive::new(source.take(MAX_UNPACKED));
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(false);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let wanted = path == FilePath::new("vmlinux") || path.starts_with("modules");
        let kind = entry.header().entry_type();
        if !wanted || !(kind.is_file() || kind.is_dir()) {
            continue;
        }
        if !entry.unpack_in(into).map_err(broken)? {
            let shown = path.display();
            return Err(Failure::new(
                ErrorKind::BadContent,
                format!("the upload has a path that leads outside: {shown}"),
            ));
        }
    }
    let (vmlinux, modules) = (into.join("vmlinux"), into.join("modules"));
    if !vmlinux.is_file() {
        return Err(
            Failure::new(ErrorKind::BadContent, "the upload holds no `vmlinux`")
                .hint("use `offshoot kernel add --vmlinux FILE [--modules DIR]`"),
        );
    }
    Ok(Files {
        vmlinux,
        modules: modules.is_dir().then_some(modules),
    })
}

#[utoipa::path(delete, path = "/v1/kernels/{id}", params(KernelPath),
    responses((status = 204)))]
async fn remove(State(app): State<Shared>, Named(id): Named<KernelId>) -> Answer<StatusCode> {
    let users: Vec<_> = app
        .engine
        .list()
        .iter()
        .map(|handle| handle.view.borrow().clone())
        .collect();
    let names: Vec<_> = users
        .iter()
        .filter(|vm| vm.kernel_id == id)
        .map(|vm| format!("`{}`", vm.name))
        .collect();
    if !names.is_empty() {
        let message = format!("kernel {id} is used by VM {}", names.join(", "));
        return Err(
            Failure::new(ErrorKind::Conflict, message).hint("remove the VM first with `offshoot rm VM`")
        );
    }
    app.kernels.remove(&id)?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/kernels/{id}/default", params(KernelPath),
    responses((status = 200, body = KernelSummary)))]
async fn set_default(State(app): State<Shared>, Named(id): Named<KernelId>) -> Answer<Json<KernelSummary>> {
    app.kernels.set_default(&id)?;
    Ok(Json(summary(&app.kernels.get(&id)?, Some(&id))))
}
