//! Answers that take long: one JSON line for every step, the last one with the result.
//!
//! The work runs in a task of its own, so that a slow reader does not slow it; a reader that goes away cancels it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use offshoot_api::progress::{Line, NDJSON};
use offshoot_engine::operation;
use offshoot_model::{Progress, ProgressEvent};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::error::{Answer, Failure};

/// Steps that may wait for a slow reader; more are left out, because each says all that the one before it said.
const MAX_WAITING: usize = 64;

/// Runs `work` and answers with its progress and its result.
pub fn answer<T, F>(work: impl FnOnce(Progress) -> F) -> Response
where
    T: Serialize + Send + 'static,
    F: Future<Output = Answer<T>> + Send + 'static,
{
    let (sender, receiver) = mpsc::unbounded_channel::<Line<T>>();
    let waiting = Arc::new(AtomicUsize::new(0));
    let progress = {
        let (sender, waiting) = (sender.clone(), Arc::clone(&waiting));
        Progress::new(move |event| {
            let droppable = matches!(event, ProgressEvent::Moved { .. });
            if droppable && waiting.load(Ordering::Relaxed) >= MAX_WAITING {
                return;
            }
            waiting.fetch_add(1, Ordering::Relaxed);
            // A reader that went away cancels the work by itself.
            let _ = sender.send(Line::Progress { progress: event });
        })
    };
    let work = work(progress);
    let id = operation::current().unwrap_or_else(operation::new_id);
    let task = async move {
        let line = match work.await.map_err(Failure::of_this_operation) {
            Ok(result) => Line::Done { result },
            Err(Failure(error)) => Line::Failed { error },
        };
        let _ = sender.send(line);
    };
    let task = AbortOnDropHandle::new(tokio::spawn(operation::within(id, task).in_current_span()));
    let lines = UnboundedReceiverStream::new(receiver).map(move |line| {
        // Moved into the stream: dropping the stream aborts the task.
        let _ = &task;
        waiting.fetch_sub(1, Ordering::Relaxed);
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(text))
    });
    ([(CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response()
}
