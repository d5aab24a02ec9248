//! Images: list, pull, import, bootstrap, prepare, verify, remove.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use futures::StreamExt as _;
use offshoot_api::image::{
    BootstrapRequest, ImageDetails, ImageQuery, ImageRemoveQuery, ImageSummary, ImagesQuery, ImportQuery,
    PrepareQuery, PullRequest, VerifyReport, WarmRequest,
};
use offshoot_api::progress::Line;
use offshoot_image::reference::ImageReference;
use offshoot_model::ErrorKind;
use tokio_util::io::{StreamReader, SyncIoBridge};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Query, Upload};
use crate::long_work;
use crate::verify;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list, remove))
        .routes(routes!(inspect))
        .routes(routes!(pull))
        .routes(routes!(import))
        .routes(routes!(bootstrap))
        .routes(routes!(prepare))
        .routes(routes!(verify))
        .routes(routes!(warm))
}

#[utoipa::path(get, path = "/v1/images", params(ImagesQuery),
    responses((status = 200, body = [ImageSummary])))]
async fn list(
    State(app): State<Shared>,
    Query(query): Query<ImagesQuery>,
) -> Answer<Json<Vec<ImageSummary>>> {
    Ok(Json(match query.reference {
        None => app.images.list().await?,
        Some(reference) => app.images.find(&reference).await?.into_iter().collect(),
    }))
}

#[utoipa::path(delete, path = "/v1/images", params(ImageRemoveQuery),
    responses((status = 204)))]
async fn remove(State(app): State<Shared>, Query(query): Query<ImageRemoveQuery>) -> Answer<StatusCode> {
    app.images.remove(&query.reference, query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// More would be a mistake: each keeps a whole VM in memory.
const MOST_SLOTS: u32 = 64;

#[utoipa::path(post, path = "/v1/images/warm", request_body = WarmRequest,
    responses((status = 204), (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn warm(State(app): State<Shared>, JsonBody(request): JsonBody<WarmRequest>) -> Answer<StatusCode> {
    if request.slots > MOST_SLOTS {
        return Err(Failure::new(
            ErrorKind::InvalidRequest,
            format!("an image has at most {MOST_SLOTS} warm slots"),
        )
        .hint("ask for fewer: each keeps a whole VM in memory"));
    }
    app.images.row(&request.reference).await?;
    app.warm.set(request.reference, request.slots as usize);
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(get, path = "/v1/images/inspect", params(ImageQuery),
    responses((status = 200, body = ImageDetails)))]
async fn inspect(State(app): State<Shared>, Query(query): Query<ImageQuery>) -> Answer<Json<ImageDetails>> {
    Ok(Json(app.images.inspect(&query.reference).await?))
}

#[utoipa::path(post, path = "/v1/images/pull", request_body = PullRequest,
    responses((status = 200, content_type = "application/x-ndjson", body = Line<ImageSummary>)))]
async fn pull(State(app): State<Shared>, JsonBody(request): JsonBody<PullRequest>) -> Answer<Response> {
    // Names are refused before there is an answer that could only fail.
    let reference: ImageReference = request.reference.parse()?;
    Ok(long_work::answer(|progress| async move {
        app.images.pull(reference, request, &progress).await
    }))
}

#[utoipa::path(post, path = "/v1/images/import", params(ImportQuery),
    request_body(content_type = "application/octet-stream", content = Vec<u8>),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<Vec<ImageSummary>>)))]
async fn import(
    State(app): State<Shared>,
    Query(query): Query<ImportQuery>,
    upload: Upload,
) -> Answer<Response> {
    let name: Option<ImageReference> = query.name.as_deref().map(str::parse).transpose()?;
    let Upload { pieces, place } = upload;
    let pieces = pieces.map(move |piece| {
        // Held by whoever reads, which goes on for a moment when the work is cancelled.
        let _ = &place;
        piece.map_err(std::io::Error::other)
    });
    let source = SyncIoBridge::new(Box::pin(StreamReader::new(pieces)));
    Ok(long_work::answer(|progress| async move {
        app.images.import(source, name, query.prepare, &progress).await
    }))
}

#[utoipa::path(post, path = "/v1/images/bootstrap", request_body = BootstrapRequest,
    responses((status = 200, content_type = "application/x-ndjson", body = Line<ImageSummary>)))]
async fn bootstrap(
    State(app): State<Shared>,
    JsonBody(request): JsonBody<BootstrapRequest>,
) -> Answer<Response> {
    let name = request.name.as_deref().unwrap_or(&request.recipe);
    let reference: ImageReference = name.parse()?;
    Ok(long_work::answer(|progress| async move {
        app.images.bootstrap(reference, request, &progress).await
    }))
}

#[utoipa::path(post, path = "/v1/images/prepare", params(PrepareQuery),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<ImageSummary>)))]
async fn prepare(State(app): State<Shared>, Query(query): Query<PrepareQuery>) -> Answer<Response> {
    app.images.row(&query.reference).await?;
    Ok(long_work::answer(|progress| async move {
        app.images.prepare(&query.reference, query.force, &progress).await
    }))
}

#[utoipa::path(post, path = "/v1/images/verify", params(ImageQuery),
    responses((status = 200, content_type = "application/x-ndjson", body = Line<VerifyReport>)))]
async fn verify(State(app): State<Shared>, Query(query): Query<ImageQuery>) -> Answer<Response> {
    app.images.row(&query.reference).await?;
    Ok(long_work::answer(|progress| async move {
        verify::verify(&app.images, &query.reference, &progress).await
    }))
}
