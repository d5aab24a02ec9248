//! Requests to the API: how many, how they ended, how long they took.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use metrics::{counter, histogram};

use super::names::{API_REQUEST_SECONDS, API_REQUESTS};

/// The status of a request whose client went away before there was an answer.
const CLIENT_GONE: u16 = 499;

/// Measures a request up to the head of its answer.
pub async fn measured(request: Request, next: Next) -> Response {
    let mut turn = Turn {
        route: route(request.extensions().get::<MatchedPath>()),
        method: method(request.method()),
        began: Instant::now(),
        status: CLIENT_GONE,
    };
    let response = next.run(request).await;
    turn.status = response.status().as_u16();
    response
}

/// One request. It is counted when it is dropped, so that one that nobody waits for any more counts as well.
struct Turn {
    route: String,
    method: &'static str,
    began: Instant,
    status: u16,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let (route, method) = (std::mem::take(&mut self.route), self.method);
        tracing::debug!(
            route,
            method,
            status = self.status,
            us = took.as_micros(),
            "answered"
        );
        histogram!(API_REQUEST_SECONDS, "route" => route.clone(), "method" => method).record(took);
        counter!(API_REQUESTS, "route" => route, "method" => method, "status" => self.status.to_string())
            .increment(1);
    }
}

/// The route as it was written (`/v1/vms/{vm}`), never the path that was asked for.
fn route(matched: Option<&MatchedPath>) -> String {
    matched.map_or("none", MatchedPath::as_str).to_owned()
}

/// A method of HTTP; clients can make up others.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::routing::get;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn requests_are_counted_by_route_and_not_by_path() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let router = axum::Router::new()
            .route("/v1/vms/{vm}", get(|| async { StatusCode::IM_A_TEAPOT }))
            .route("/never", get(|| async { std::future::pending::<&str>().await }))
            .fallback(|| async { StatusCode::NOT_FOUND })
            .layer(axum::middleware::from_fn(measured));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ask = |method: &str, path: &str| {
            let request = Request::builder().method(method).uri(path);
            router.clone().oneshot(request.body(Body::empty()).unwrap())
        };
        metrics::with_local_recorder(&recorder, || {
            runtime.block_on(async {
                for path in ["/v1/vms/web", "/v1/vms/other", "/nowhere", "/else?where"] {
                    ask("GET", path).await.unwrap();
                }
                ask("BREW", "/nowhere").await.unwrap();
                let mut waiting = Box::pin(ask("GET", "/never"));
                assert!(futures::poll!(&mut waiting).is_pending());
            });
        });
        let text = handle.render();
        for line in [
            r#"offshoot_api_requests_total{route="/v1/vms/{vm}",method="GET",status="418"} 2"#,
            r#"offshoot_api_requests_total{route="none",method="GET",status="404"} 2"#,
            r#"offshoot_api_requests_total{route="none",method="other",status="404"} 1"#,
            r#"offshoot_api_requests_total{route="/never",method="GET",status="499"} 1"#,
            r#"offshoot_api_request_duration_seconds_count{route="/v1/vms/{vm}",method="GET"} 2"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("web"), "{text}");
    }
}
