//! The HTTP API: one module a resource. Handlers translate; they decide nothing.

mod archive;
mod dns;
mod doctor;
mod document;
mod events;
mod exec;
mod images;
mod kernels;
mod logs;
mod metrics;
mod networks;
mod operations;
mod session;
mod ssh;
mod stats;
mod system;
mod templates;
pub mod vms;

use std::any::Any;

use axum::Json;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::app::Shared;
use crate::operations::as_operation;
use crate::prometheus::measured;
use crate::refusal::Refusal;
use crate::serve::Patience;

pub use metrics::alone as metrics_alone;

#[derive(OpenApi)]
#[openapi(info(title = "Offshoot", description = "Virtual machines from OCI images."))]
struct Document;

/// Every route, and the document that describes them.
pub fn router(app: Shared, patience: Patience) -> axum::Router {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(vms::routes())
        .merge(logs::routes())
        .merge(session::routes())
        .merge(ssh::routes())
        .merge(stats::routes())
        .merge(exec::routes())
        .merge(archive::routes())
        .merge(images::routes())
        .merge(kernels::routes())
        .merge(networks::routes())
        .merge(templates::routes())
        .merge(system::routes())
        .merge(events::routes())
        .merge(operations::routes())
        .merge(metrics::routes())
        .merge(doctor::routes())
        .merge(dns::routes())
        .split_for_parts();
    document::complete(&mut document);
    let router = router
        .route("/openapi.json", get(|| async { Json(document) }))
        .with_state(app);
    guarded(router, patience)
}

/// Routes as clients reach them: whatever happens to a request, its answer has the one error shape, and the daemon lives.
fn guarded(router: axum::Router, patience: Patience) -> axum::Router {
    router
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyTimeoutLayer::new(patience.body))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn(measured))
        .layer(axum::middleware::from_fn(as_operation))
}

/// A path as errors show it.
fn shown(uri: &Uri) -> String {
    uri.path().chars().take(200).collect()
}

async fn nowhere(uri: Uri) -> Refusal {
    Refusal::nowhere(
        format!("there is nothing at `{}`", shown(&uri)),
        "see GET /openapi.json",
    )
}

async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let method: String = method.as_str().chars().take(40).collect();
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("`{}` does not take {method}", shown(&uri)),
        "see GET /openapi.json",
    )
}

/// A handler panicked: a mistake of ours. The panic's own message is in the log already.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    tracing::error!("a handler panicked");
    Refusal::broken("the daemon made a mistake while it answered").into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::{Body, to_bytes};
    use axum::extract::Request;
    use futures::{StreamExt as _, stream};
    use offshoot_api::error::ApiError;
    use offshoot_model::{ErrorKind, VmName};
    use tower::ServiceExt as _;

    use super::*;
    use crate::extract::{JsonBody, Named, Query};

    #[derive(serde::Deserialize)]
    struct Numbers {
        number: u8,
    }

    fn routes() -> axum::Router {
        let router = axum::Router::new()
            .route(
                "/panic",
                get(|| async {
                    if true {
                        panic!("on purpose")
                    }
                }),
            )
            .route(
                "/vms/{vm}",
                get(|Named(vm): Named<VmName>| async move { vm.to_string() }),
            )
            .route(
                "/query",
                get(|Query(query): Query<Numbers>| async move { query.number.to_string() }),
            )
            .route(
                "/json",
                axum::routing::post(
                    |JsonBody(body): JsonBody<Numbers>| async move { body.number.to_string() },
                ),
            );
        guarded(
            router,
            Patience {
                head: Duration::from_secs(30),
                body: Duration::from_millis(200),
            },
        )
    }

    async fn ask(method: &str, path: &str, json: Option<&str>, body: impl Into<Body>) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(content_type) = json {
            request = request.header("content-type", content_type);
        }
        routes()
            .oneshot(request.body(body.into()).unwrap())
            .await
            .unwrap()
    }

    async fn text_of(response: Response) -> String {
        let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn every_refusal_has_the_one_shape() {
        let json = Some("application/json");
        let deep = "[".repeat(100_000);
        let long = format!("/vms/{}", "a".repeat(300));
        for (method, path, content_type, body, status, kind) in [
            ("GET", "/nowhere", None, "", 404, ErrorKind::NotFound),
            ("POST", "/query", None, "", 405, ErrorKind::InvalidRequest),
            ("GET", "/panic", None, "", 500, ErrorKind::Internal),
            ("GET", "/vms/..%2Fx", None, "", 400, ErrorKind::InvalidRequest),
            ("GET", "/vms/%FF", None, "", 400, ErrorKind::InvalidRequest),
            ("GET", "/vms/a%00b", None, "", 400, ErrorKind::InvalidRequest),
            ("GET", "/vms/-x", None, "", 400, ErrorKind::InvalidRequest),
            ("GET", &long, None, "", 400, ErrorKind::InvalidRequest),
            ("GET", "/query", None, "", 400, ErrorKind::InvalidRequest),
            (
                "GET",
                "/query?number=256",
                None,
                "",
                400,
                ErrorKind::InvalidRequest,
            ),
            (
                "GET",
                "/query?number=1&number=2",
                None,
                "",
                400,
                ErrorKind::InvalidRequest,
            ),
            ("GET", "/query?%FF=%FF", None, "", 400, ErrorKind::InvalidRequest),
            ("POST", "/json", None, "{}", 415, ErrorKind::InvalidRequest),
            (
                "POST",
                "/json",
                Some("text/plain"),
                "{}",
                415,
                ErrorKind::InvalidRequest,
            ),
            ("POST", "/json", json, "", 400, ErrorKind::InvalidRequest),
            ("POST", "/json", json, "{", 400, ErrorKind::InvalidRequest),
            ("POST", "/json", json, "{}", 400, ErrorKind::InvalidRequest),
            (
                "POST",
                "/json",
                json,
                "{\"number\":\"x\"}",
                400,
                ErrorKind::InvalidRequest,
            ),
            ("POST", "/json", json, &deep, 400, ErrorKind::InvalidRequest),
        ] {
            let response = ask(method, path, content_type, body.to_owned()).await;
            assert_eq!(response.status().as_u16(), status, "{method} {path} {body:.20}");
            assert_eq!(response.headers()["content-type"], "application/json");
            let error: ApiError = serde_json::from_str(&text_of(response).await).unwrap();
            assert_eq!(error.kind, kind, "{method} {path}");
            assert!(
                !error.hints.is_empty() && !error.message.contains(char::is_control),
                "{error:?}"
            );
        }
        let wrong_method = ask("POST", "/query", None, "").await;
        assert_eq!(wrong_method.headers()["allow"], "GET,HEAD");
    }

    #[tokio::test]
    async fn what_is_right_gets_through() {
        for (method, path, content_type, body, answer) in [
            ("GET", "/vms/web-1", None, "", "web-1"),
            ("GET", "/query?number=7", None, "", "7"),
            (
                "POST",
                "/json",
                Some("application/json; charset=utf-8"),
                "{\"number\":7}",
                "7",
            ),
            (
                "POST",
                "/json",
                Some("Application/Vnd.X+JSON"),
                "{\"number\":7}",
                "7",
            ),
        ] {
            assert_eq!(text_of(ask(method, path, content_type, body).await).await, answer);
        }
    }

    #[tokio::test]
    async fn a_body_that_stands_still_is_given_up() {
        let pieces = stream::iter([Ok::<_, std::io::Error>("{")]).chain(stream::pending());
        let response = ask(
            "POST",
            "/json",
            Some("application/json"),
            Body::from_stream(pieces),
        )
        .await;
        assert_eq!(response.status().as_u16(), 408);
    }
}
