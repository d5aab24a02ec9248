//! `logs`: what the main process wrote, or what the guest's console said.

use std::collections::VecDeque;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use futures::stream;
use offshoot_api::log_frame::{self, LogStream};
use offshoot_api::vm::LogsQuery;
use offshoot_engine::output::{Follow, Follower, Record, RecordKind};
use offshoot_engine::owner::VmHandle;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::may_write;
use crate::app::Shared;
use crate::error::{Answer, Failure};
use crate::extract::Query;

/// The most of a console log that is sent: the driver keeps less.
const MAX_CONSOLE: usize = 1 << 20;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(logs))
}

#[utoipa::path(get, path = "/v1/vms/{vm}/logs", params(("vm" = String, Path), LogsQuery),
    responses((status = 200, content_type = "application/vnd.docker.multiplexed-stream", body = Vec<u8>),
        (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn logs(
    State(app): State<Shared>,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Answer<Response> {
    let handle = app.engine.find(&name)?;
    let headers = [(CONTENT_TYPE, log_frame::MEDIA_TYPE)];
    if query.console {
        return Ok((headers, Body::from(console(&handle).await)).into_response());
    }
    let mut follower = handle.output.follow(Follow::Kept);
    let mut printer = Printer {
        timestamps: query.timestamps,
        at_line_start: [true; 2],
    };
    // What is there already is read in one go, so that `--tail` can count from its end.
    let there = tokio::task::spawn_blocking(move || {
        let mut lines = Tail::new(query.tail);
        while let Some(record) = follower.try_next()? {
            lines.push(record);
        }
        Ok::<_, std::io::Error>((follower, lines.into_records()))
    });
    let (follower, there) = there
        .await
        .map_err(|_| Failure::broken("reading the log"))?
        .map_err(|error| unreadable(&error))?;
    let mut first = BytesMut::new();
    for record in &there {
        printer.print(record, &mut first);
    }
    if !query.follow {
        return Ok((headers, Body::from(first.freeze())).into_response());
    }
    let state = Following {
        handle,
        follower,
        printer,
        first: Some(first.freeze()),
    };
    let frames = stream::try_unfold(state, |mut state| async move {
        if let Some(first) = state.first.take() {
            return Ok(Some((first, state)));
        }
        let Some(record) = next_or_end(&state.handle, &mut state.follower).await? else {
            return Ok(None);
        };
        let mut frame = BytesMut::new();
        state.printer.print(&record, &mut frame);
        Ok::<_, std::io::Error>(Some((frame.freeze(), state)))
    });
    Ok((headers, Body::from_stream(frames)).into_response())
}

struct Following {
    handle: VmHandle,
    follower: Follower,
    printer: Printer,
    first: Option<Bytes>,
}

/// The next record, or `None` when the VM does not run and all is read.
pub(super) async fn next_or_end(
    handle: &VmHandle,
    follower: &mut Follower,
) -> std::io::Result<Option<Record>> {
    let mut view = handle.view.clone();
    tokio::select! {
        biased;
        record = follower.next() => record.map(Some),
        ended = view.wait_for(|vm| !may_write(vm.life.state)) => {
            drop(ended);
            // The state is announced after the last record was written.
            follower.try_next()
        }
    }
}

async fn console(handle: &VmHandle) -> Bytes {
    let live = handle.live.borrow().clone();
    let bytes = match live {
        Some(live) => live.machine.console_tail(MAX_CONSOLE).await.unwrap_or_default(),
        None => std::fs::read(handle.paths.console()).unwrap_or_default(),
    };
    let mut frames = BytesMut::new();
    for chunk in bytes[bytes.len().saturating_sub(MAX_CONSOLE)..].chunks(64 << 10) {
        log_frame::encode(LogStream::Stdout, chunk, &mut frames);
    }
    frames.freeze()
}

fn unreadable(error: &std::io::Error) -> Failure {
    Failure::new(
        offshoot_model::ErrorKind::Internal,
        format!("cannot read the log: {error}"),
    )
}

/// Keeps the records that hold the last so many lines.
struct Tail {
    limit: Option<u64>,
    records: VecDeque<(Record, u64)>,
    lines: u64,
}

impl Tail {
    fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            records: VecDeque::new(),
            lines: 0,
        }
    }

    fn push(&mut self, record: Record) {
        let lines = record.data.iter().filter(|b| **b == b'\n').count() as u64;
        self.lines += lines;
        self.records.push_back((record, lines));
        let Some(limit) = self.limit else { return };
        // One line more is kept than asked for: the last one may not be ended yet.
        while let Some((_, lines)) = self.records.front()
            && self.lines - lines > limit
        {
            self.lines -= lines;
            self.records.pop_front();
        }
    }

    fn into_records(self) -> Vec<Record> {
        let Some(limit) = self.limit else {
            return self.records.into_iter().map(|(record, _)| record).collect();
        };
        let ends_open = self
            .records
            .back()
            .is_some_and(|(record, _)| record.data.last().is_some_and(|b| *b != b'\n'));
        let mut skip = (self.lines + u64::from(ends_open)).saturating_sub(limit);
        let mut kept = Vec::new();
        for (mut record, _) in self.records {
            while skip > 0 {
                let Some(end) = record.data.iter().position(|b| *b == b'\n') else {
                    break;
                };
                record.data = record.data.slice(end + 1..);
                skip -= 1;
            }
            if skip == 0 {
                kept.push(record);
            }
        }
        kept
    }
}

/// Turns records into frames, with a time before every line if asked.
struct Printer {
    timestamps: bool,
    at_line_start: [bool; 2],
}

impl Printer {
    fn print(&mut self, record: &Record, into: &mut BytesMut) {
        let (stream, slot) = match record.kind {
            RecordKind::Begin => return,
            RecordKind::Stdout => (LogStream::Stdout, 0),
            RecordKind::Stderr | RecordKind::Lost => (LogStream::Stderr, 1),
        };
        let told;
        let data: &[u8] = if record.kind == RecordKind::Lost {
            told = format!(
                "[{} bytes were lost while no daemon listened]\n",
                String::from_utf8_lossy(&record.data)
            );
            told.as_bytes()
        } else {
            &record.data
        };
        if data.is_empty() {
            return;
        }
        if !self.timestamps {
            return log_frame::encode(stream, data, into);
        }
        let when = std::time::UNIX_EPOCH + std::time::Duration::from_millis(record.time_ms);
        let stamp = format!("{} ", humantime::format_rfc3339_millis(when));
        let mut stamped = Vec::with_capacity(data.len() + stamp.len());
        for line in data.split_inclusive(|b| *b == b'\n') {
            if self.at_line_start[slot] {
                stamped.extend_from_slice(stamp.as_bytes());
            }
            stamped.extend_from_slice(line);
            self.at_line_start[slot] = line.ends_with(b"\n");
        }
        log_frame::encode(stream, &stamped, into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(data: &'static str) -> Record {
        Record {
            kind: RecordKind::Stdout,
            time_ms: 0,
            offset: 0,
            data: data.into(),
        }
    }

    #[test]
    fn the_tail_counts_lines_from_the_end() {
        let check = |limit: Option<u64>, expected: &str| {
            let mut tail = Tail::new(limit);
            for data in ["one\ntw", "o\nthr", "ee\nfour"] {
                tail.push(record(data));
            }
            let seen: Vec<u8> = tail.into_records().iter().flat_map(|r| r.data.to_vec()).collect();
            assert_eq!(String::from_utf8(seen).unwrap(), expected, "{limit:?}");
        };
        check(None, "one\ntwo\nthree\nfour");
        check(Some(0), "");
        check(Some(1), "four");
        check(Some(2), "three\nfour");
        check(Some(3), "two\nthree\nfour");
        check(Some(9), "one\ntwo\nthree\nfour");
    }

    #[test]
    fn a_time_stands_before_every_line_and_only_there() {
        let mut printer = Printer {
            timestamps: true,
            at_line_start: [true; 2],
        };
        let mut frames = BytesMut::new();
        printer.print(&record("a\nb"), &mut frames);
        printer.print(&record("c\n"), &mut frames);
        let mut text = String::new();
        while let Some((_, data)) = log_frame::decode(&mut frames).unwrap() {
            text.push_str(std::str::from_utf8(&data).unwrap());
        }
        assert_eq!(text, "1970-01-01T00:00:00.000Z a\n1970-01-01T00:00:00.000Z bc\n");
    }
}
