//! The daemon's log: lines for people or JSON, on standard error. Both carry the ids of operations, in their spans.

use std::io::IsTerminal as _;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// What is logged by default. Not what the DNS libraries have to say of messages that strangers send.
const DEFAULT: &str = "info,hickory_net=off,hickory_proto=off,hickory_resolver=off";

/// Logs from now on. `OFFSHOOT_LOG` sets what.
pub fn start(json: bool) {
    let filter = EnvFilter::try_from_env("OFFSHOOT_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    // Colours in a journal or a file keep `grep op=…` from finding anything.
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = subscriber(json, filter, colours, std::io::stderr);
    if let Err(error) = tracing::subscriber::set_global_default(log) {
        tracing::debug!(%error, "somebody else logs already");
    }
}

fn subscriber<W>(json: bool, filter: EnvFilter, colours: bool, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        // Where standard error is a terminal that is gone, a line is lost, and nothing else.
        .log_internal_errors(false)
        .with_writer(writer);
    if json {
        Box::new(log.json().finish())
    } else {
        Box::new(log.with_target(false).finish())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use axum::body::Body;
    use axum::extract::Request;
    use axum::routing::get;
    use offshoot_engine::operation::Stages;
    use tower::ServiceExt as _;

    use super::*;
    use crate::operations::{HEADER, as_operation};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// The log of one request that runs a stage, and the id that its answer names.
    fn logged(json: bool) -> (Vec<String>, String) {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = subscriber(json, EnvFilter::new("debug"), false, move || writer.clone());
        let router = axum::Router::new()
            .route(
                "/stage",
                get(|| async {
                    let mut stages = Stages::begin("start");
                    stages
                        .stage("root.prepare", async { Ok::<_, ()>(()) })
                        .await
                        .unwrap();
                    tracing::info!("in between");
                }),
            )
            .layer(axum::middleware::from_fn(as_operation));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let answer = tracing::subscriber::with_default(log, || {
            let request = Request::builder().uri("/stage").body(Body::empty()).unwrap();
            runtime.block_on(router.oneshot(request)).unwrap()
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        let id = answer.headers()[HEADER].to_str().unwrap().to_owned();
        (text.lines().map(str::to_owned).collect(), id)
    }

    #[test]
    fn every_line_of_an_operation_has_its_id() {
        let (lines, id) = logged(false);
        assert_eq!(lines.len(), 3, "{lines:?}");
        let span = format!("request{{op={id} method=GET path=\"/stage\"}}");
        assert!(lines.iter().all(|line| line.contains(&span)), "{lines:?}");
        assert!(lines[0].contains("stage=\"root.prepare\""), "{lines:?}");
        assert!(lines[2].contains("operation ended"), "{lines:?}");
    }

    #[test]
    fn so_has_every_json_line() {
        let (lines, id) = logged(true);
        let lines: Vec<serde_json::Value> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(
            lines.iter().all(|line| line["span"]["op"] == id.as_str()),
            "{lines:?}"
        );
        assert_eq!(lines[0]["fields"]["op"], id.as_str());
        assert_eq!(lines[0]["fields"]["stage"], "root.prepare");
        assert_eq!(lines[1]["fields"]["message"], "in between");
        assert_eq!(lines[2]["fields"]["outcome"], "done");
    }
}
