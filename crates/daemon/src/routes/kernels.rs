//! Kernel bundles: list, add, compile, remove, choose.

use std::io::Read;
use std::path::{Path as FilePath, PathBuf};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use futures::StreamExt as _;
use offshoot_api::kernel::{BuildQuery, DistroRequest, KernelPath, KernelSummary};
use offshoot_api::progress::Line;
use offshoot_engine::operation::Subject;
use offshoot_kernel::{CompileOptions, DistroOptions, FRAGMENT_MAX, KernelBundle};
use offshoot_model::{ErrorKind, KernelId, Progress};
use offshoot_sys::durable::StagingDir;
use tokio_util::io::{StreamReader, SyncIoBridge};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::blocking::blocking;
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Named, Query, Upload};
use crate::long_work;

/// The most that a kernel and its modules may unpack to: a full distribution kernel with all modules has under 1 GiB.
const MAX_UNPACKED: u64 = 4 << 30;
/// The largest tarball of Linux: compressed with xz it has 150 MiB, not compressed at all 1.6 GiB.
const MAX_TARBALL: u64 = 3 << 30;
/// The most compilers at once that a client may ask for.
const MAX_JOBS: u32 = 1024;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(add_distro))
        .routes(routes!(add_files))
        .routes(routes!(build))
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
        let package = request.package.as_deref().unwrap_or("the distribution's newest");
        let mut stages = app
            .engine
            .operations()
            .begin("kernel-add", Subject::named(package));
        let options = DistroOptions {
            package: request.package,
        };
        let (kernels, agent) = (&app.kernels, &app.agent);
        let bundle = stages
            .stage_with_tasks("bundle", &progress, |progress| async move {
                kernels.add_distro(agent, &options, &progress).await
            })
            .await?;
        Ok(summary(&bundle, Some(&bundle.id)))
    })
}

#[utoipa::path(post, path = "/v1/kernels/files",
    request_body(content_type = "application/x-tar", content = Vec<u8>),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<KernelSummary>)))]
async fn add_files(State(app): State<Shared>, upload: Upload) -> Response {
    let source = reader(upload);
    long_work::answer(|progress| async move {
        let subject = Subject::named("files of a user's own");
        let mut stages = app.engine.operations().begin("kernel-add", subject);
        let staging = staging(&app)?;
        let into = staging.path().to_owned();
        let unpacked = blocking("unpacking the upload", move || unpack(source, &into));
        let files = stages.stage("unpack", unpacked).await?;
        let (app, files) = (&app, &files);
        let bundle = stages
            .stage_with_tasks("bundle", &progress, |progress| async move {
                add(app, files, &progress).await
            })
            .await?;
        drop(staging);
        Ok(summary(&bundle, Some(&bundle.id)))
    })
}

#[utoipa::path(post, path = "/v1/kernels/build", params(BuildQuery),
    request_body(content_type = "application/x-tar", content = Vec<u8>),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<KernelSummary>)))]
async fn build(
    State(app): State<Shared>,
    Query(query): Query<BuildQuery>,
    upload: Upload,
) -> Answer<Response> {
    if query.jobs.is_some_and(|jobs| !(1..=MAX_JOBS).contains(&jobs)) {
        let message = format!("the number of jobs is not in 1 to {MAX_JOBS}");
        return Err(Failure::new(ErrorKind::InvalidRequest, message)
            .hint("leave `--jobs` out to take as many as there are processors"));
    }
    let source = reader(upload);
    Ok(long_work::answer(|progress| async move {
        let staging = staging(&app)?;
        let into = staging.path().to_owned();
        let unpacked = tokio::task::spawn_blocking(move || unpack_build(source, &into)).await;
        let given = unpacked.map_err(|_| Failure::broken("unpacking the upload"))??;
        let options = CompileOptions {
            source: given.source,
            fragment: given.fragment,
            jobs: query.jobs,
            user: app.config.builder(),
        };
        let bundle = app.kernels.compile(&app.agent, &options, &progress).await?;
        drop(staging);
        let default = app.kernels.default().ok().map(|bundle| bundle.id);
        Ok(summary(&bundle, default.as_ref()))
    }))
}

/// A reader of an upload for a thread that may block.
fn reader(upload: Upload) -> impl Read + Send {
    let Upload { pieces, place } = upload;
    let pieces = pieces.map(move |piece| {
        // Held by whoever reads, which goes on for a moment when the work is cancelled.
        let _ = &place;
        piece.map_err(std::io::Error::other)
    });
    SyncIoBridge::new(Box::pin(StreamReader::new(pieces)))
}

fn staging(app: &App) -> Answer<StagingDir> {
    StagingDir::new(app.data_dir.join("tmp"), "kernel-upload")
        .map_err(|error| Failure::new(ErrorKind::Internal, format!("cannot unpack the upload: {error}")))
}

/// What a build was given.
#[derive(Debug, Default)]
struct Given {
    fragment: String,
    source: Option<PathBuf>,
}

/// Takes `fragment` and `source` out of an upload. Whoever sends anything else, or no tar at all, wants something else than a
/// build that takes long.
fn unpack_build(mut upload: impl Read, into: &FilePath) -> Answer<Given> {
    let bad = |what: String| {
        Failure::new(ErrorKind::BadContent, what)
            .hint("use `offshoot kernel build [--config-fragment FILE] [--source FILE]`")
    };
    let broken = |error: std::io::Error| bad(format!("cannot unpack the upload: {error}"));
    let mut first = [0];
    if upload.read(&mut first).map_err(broken)? == 0 {
        return Err(bad("the upload is empty, and not a tar".to_owned()));
    }
    let upload = std::io::Cursor::new(first)
        .chain(upload)
        .take(MAX_TARBALL + 2 * FRAGMENT_MAX);
    let mut given = Given::default();
    let mut archive = tar::Archive::new(upload);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let name = if entry.header().entry_type().is_file() {
            path.to_str()
        } else {
            None
        };
        match name {
            Some("fragment") if entry.size() > FRAGMENT_MAX => {
                return Err(bad(format!(
                    "the configuration fragment is longer than {FRAGMENT_MAX} bytes"
                )));
            }
            Some("fragment") => {
                entry.read_to_string(&mut given.fragment).map_err(broken)?;
            }
            Some("source") => {
                let place = into.join("source");
                let mut file = std::fs::File::create_new(&place).map_err(broken)?;
                std::io::copy(&mut entry, &mut file).map_err(broken)?;
                given.source = Some(place);
            }
            _ => {
                let shown: String = path.to_string_lossy().chars().take(80).collect();
                return Err(bad(format!("the upload holds `{shown}`, which no build takes")));
            }
        }
    }
    Ok(given)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(data.len() as u64);
            tar.append_data(&mut header, name, *data).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn a_build_takes_its_two_files_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |upload: &[u8]| unpack_build(upload, dir.path()).unwrap_err().0.message;
        assert_eq!(refused(b""), "the upload is empty, and not a tar");
        assert!(refused(b"text").starts_with("cannot unpack the upload: "));
        assert_eq!(
            refused(&tar_of(&[("vmlinux", b"x")])),
            "the upload holds `vmlinux`, which no build takes"
        );
        let long = vec![b'#'; FRAGMENT_MAX as usize + 1];
        assert_eq!(
            refused(&tar_of(&[("fragment", &long)])),
            "the configuration fragment is longer than 1048576 bytes"
        );
        let nothing = unpack_build(tar_of(&[]).as_slice(), dir.path()).unwrap();
        assert!(nothing.source.is_none() && nothing.fragment.is_empty());
        let tar = tar_of(&[("fragment", b"CONFIG_A=y\n"), ("source", b"tarball")]);
        let given = unpack_build(tar.as_slice(), dir.path()).unwrap();
        assert_eq!(given.fragment, "CONFIG_A=y\n");
        assert_eq!(std::fs::read(given.source.unwrap()).unwrap(), b"tarball");
    }
}
