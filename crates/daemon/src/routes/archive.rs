//! Files into a VM and out of it, as tar streams.

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt as _, TryStreamExt as _};
use offshoot_api::vm::{ArchiveQuery, ArchiveUnpacked, PATH_STAT_HEADER, PathStat, VmPath};
use offshoot_model::{ErrorKind, VmName};
use tokio_util::io::StreamReader;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::live;
use crate::app::Shared;
use crate::error::{Answer, Failure};
use crate::extract::{Named, Query};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(read, write))
}

/// The longest path that Linux takes, without its NUL.
const MAX_PATH: usize = 4095;

/// Guests know no other paths.
fn absolute(query: &ArchiveQuery) -> Answer<&str> {
    if query.path.starts_with('/') && !query.path.contains('\0') && query.path.len() <= MAX_PATH {
        return Ok(&query.path);
    }
    let shown: String = query
        .path
        .chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect();
    Err(Failure::new(
        ErrorKind::InvalidRequest,
        format!("`{shown}` is not an absolute path of at most {MAX_PATH} bytes"),
    )
    .hint("write VM:/path"))
}

#[utoipa::path(get, path = "/v1/vms/{vm}/archive", params(VmPath, ArchiveQuery),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>)))]
async fn read(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<ArchiveQuery>,
) -> Answer<Response> {
    let live = live(&app.engine.find(name.as_str())?)?;
    let copied = live.agent.copy_out(absolute(&query)?).await?;
    let stat = PathStat {
        name: copied.stat.name,
        mode: copied.stat.mode,
        size: copied.stat.size,
        link_target: copied.stat.link_target,
    };
    // Names from a guest may hold what no header can; JSON escapes it.
    let text = serde_json::to_string(&stat).unwrap_or_default();
    let ascii: String = text
        .chars()
        .flat_map(|c| if c.is_ascii() { vec![c] } else { escape(c) })
        .collect();
    let stat = HeaderValue::try_from(ascii).map_err(|_| Failure::broken("describing the file"))?;
    let tar = copied.tar.map_err(std::io::Error::other);
    Ok((
        [
            (
                CONTENT_TYPE.as_str(),
                HeaderValue::from_static("application/x-tar"),
            ),
            (PATH_STAT_HEADER, stat),
        ],
        Body::from_stream(tar),
    )
        .into_response())
}

/// A character as JSON writes it in ASCII.
fn escape(c: char) -> Vec<char> {
    let mut units = [0; 2];
    c.encode_utf16(&mut units)
        .iter()
        .flat_map(|unit| format!("\\u{unit:04x}").chars().collect::<Vec<_>>())
        .collect()
}

#[utoipa::path(put, path = "/v1/vms/{vm}/archive", params(VmPath, ArchiveQuery),
    request_body(content_type = "application/x-tar", content = Vec<u8>),
    responses((status = 200, body = ArchiveUnpacked)))]
async fn write(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<ArchiveQuery>,
    request: Request,
) -> Answer<Json<ArchiveUnpacked>> {
    let live = live(&app.engine.find(name.as_str())?)?;
    let body = request
        .into_body()
        .into_data_stream()
        .map(|chunk| chunk.map_err(std::io::Error::other));
    let files = live
        .agent
        .copy_in(absolute(&query)?, StreamReader::new(body))
        .await?;
    Ok(Json(ArchiveUnpacked { files }))
}
