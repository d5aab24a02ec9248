//! Extractors whose refusals have the one error shape. Whatever a path, a query or a body names is checked here, before
//! any handler uses it.

use std::str::FromStr;

use axum::body::BodyDataStream;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use offshoot_model::Explain;
use serde::de::DeserializeOwned;

use crate::body::{UploadPlace, read_json, upload_place};
use crate::refusal::Refusal;

/// A JSON body.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        if !is_json(request.headers()) {
            return Err(Refusal::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the request's body is not JSON",
                "send `Content-Type: application/json`",
            ));
        }
        let announced = announced_length(request.headers());
        let bytes = read_json(request.into_body(), announced).await?;
        match axum::Json::from_bytes(&bytes) {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(not_understood(&rejection.body_text())),
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let essence = value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn announced_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A body that is read piece by piece, with its place among the uploads.
pub struct Upload {
    /// The pieces.
    pub pieces: BodyDataStream,
    /// Held as long as they are read.
    pub place: UploadPlace,
}

impl<S: Send + Sync> FromRequest<S> for Upload {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        Ok(Self {
            place: upload_place()?,
            pieces: request.into_body().into_data_stream(),
        })
    }
}

/// A query string.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(not_understood(&rejection.body_text())),
        }
    }
}

/// A request to speak WebSocket.
pub struct Upgrade(pub WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self(upgrade)),
            Err(rejection) => Err(Refusal::new(
                rejection.status(),
                format!("this is a session: {}", rejection.body_text()),
                "open a WebSocket (for `exec` and `attach` with the subprotocol `v5.channel.k8s.io`), or use `offshoot exec`, `offshoot attach` or `offshoot ssh`",
            )),
        }
    }
}

/// The one name or id in a path. Its type is the rule for it: nothing else gets in.
pub struct Named<T>(pub T);

impl<T, S> FromRequestParts<S> for Named<T>
where
    T: FromStr + Send,
    T::Err: Explain,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(text)) => text
                .parse()
                .map(Self)
                .map_err(|error: T::Err| Refusal::explained(&error)),
            Err(rejection) => Err(not_understood(&rejection.body_text())),
        }
    }
}

fn not_understood(why: &str) -> Refusal {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let why: String = why.chars().take(300).map(plain).collect();
    Refusal::new(
        StatusCode::BAD_REQUEST,
        format!("cannot understand the request: {why}"),
        "see GET /openapi.json",
    )
}
