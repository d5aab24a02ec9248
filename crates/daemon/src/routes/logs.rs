//! `logs`: what the main process wrote, or what the guest's console said.

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use futures::stream;
use offshoot_api::log_frame::{self, LogStream};
use offshoot_api::vm::{LogsQuery, VmPath};
use offshoot_engine::output::{Follow, Follower, Record, RecordKind};
use offshoot_engine::owner::VmHandle;
use offshoot_model::VmName;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::may_write;
use crate::app::Shared;
use crate::error::{Answer, Failure};
use crate::extract::{Named, Query};

/// The most of a console log that is sent: the driver keeps less.
const MAX_CONSOLE: usize = 1 << 20;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(logs))
}

#[utoipa::path(get, path = "/v1/vms/{vm}/logs", params(VmPath, LogsQuery),
    responses((status = 200, content_type = "application/vnd.docker.multiplexed-stream", body = Vec<u8>)))]
async fn logs(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<LogsQuery>,
) -> Answer<Response> {
    let handle = app.engine.find(name.as_str())?;
    let headers = [(CONTENT_TYPE, log_frame::MEDIA_TYPE)];
    if query.console {
        return Ok((headers, Body::from(console(&handle).await)).into_response());
    }
    let mut reading = Reading {
        follower: handle.output.follow(Follow::Kept),
        printer: Printer {
            timestamps: query.timestamps,
            at_line_start: [true; 2],
        },
        skip: Skip(0),
    };
    if let Some(lines) = query.tail {
        let all = handle.output.follow(Follow::Kept);
        reading.skip = tokio::task::spawn_blocking(move || Skip::all_but(lines, all))
            .await
            .map_err(|_| Failure::broken("reading the log"))?
            .map_err(|error| unreadable(&error))?;
    }
    // The first piece is read before the answer begins, so that a log that cannot be read is an error.
    let (reading, first, all) = reading.piece().await.map_err(|error| unreadable(&error))?;
    if all && !query.follow {
        return Ok((headers, Body::from(first)).into_response());
    }
    let state = Following {
        handle,
        reading,
        first: Some(first),
        follow: query.follow,
    };
    let frames = stream::try_unfold(state, |mut state| async move {
        if let Some(first) = state.first.take() {
            return Ok(Some((first, state)));
        }
        let (mut reading, piece, _) = state.reading.piece().await?;
        let piece = match piece.is_empty() {
            false => piece,
            true if !state.follow => return Ok(None),
            true => match next_or_end(&state.handle, &mut reading.follower).await? {
                None => return Ok(None),
                Some(record) => reading.frames_of(record),
            },
        };
        Ok::<_, std::io::Error>(Some((piece, Following { reading, ..state })))
    });
    Ok((headers, Body::from_stream(frames)).into_response())
}

/// How much of a log is in memory at once for one client, who may be slow to take it.
const PIECE: usize = 256 << 10;

/// A reader of a log, with what it prints.
struct Reading {
    follower: Follower,
    printer: Printer,
    skip: Skip,
}

impl Reading {
    /// Frames of what is there already, and whether that is all of it. Reads on a thread that may wait for the disk.
    async fn piece(mut self) -> std::io::Result<(Self, Bytes, bool)> {
        tokio::task::spawn_blocking(move || {
            let mut frames = BytesMut::new();
            while frames.len() < PIECE {
                let Some(record) = self.follower.try_next()? else {
                    return Ok((self, frames.freeze(), true));
                };
                self.print(record, &mut frames);
            }
            Ok((self, frames.freeze(), false))
        })
        .await?
    }

    fn frames_of(&mut self, record: Record) -> Bytes {
        let mut frames = BytesMut::new();
        self.print(record, &mut frames);
        frames.freeze()
    }

    fn print(&mut self, record: Record, into: &mut BytesMut) {
        if let Some(record) = self.skip.cut(record) {
            self.printer.print(&record, into);
        }
    }
}

struct Following {
    handle: VmHandle,
    reading: Reading,
    first: Option<Bytes>,
    follow: bool,
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

/// How many lines are left out at the beginning of a log.
///
/// They are counted first and left out while the log is read again: its last lines may be most of 64 MiB, and a client
/// that does not take them would keep them in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Skip(u64);

impl Skip {
    /// All but the last `keep` lines of what is there.
    fn all_but(keep: u64, mut follower: Follower) -> std::io::Result<Self> {
        let mut count = Count::default();
        while let Some(record) = follower.try_next()? {
            count.add(&record);
        }
        Ok(Self(count.lines().saturating_sub(keep)))
    }

    /// What is left of the next record.
    fn cut(&mut self, mut record: Record) -> Option<Record> {
        while self.0 > 0 {
            let end = record.data.iter().position(|b| *b == b'\n')?;
            record.data = record.data.slice(end + 1..);
            self.0 -= 1;
        }
        Some(record)
    }
}

/// Counts lines. The last one may not be ended yet.
#[derive(Default)]
struct Count {
    ended: u64,
    open: bool,
}

impl Count {
    fn add(&mut self, record: &Record) {
        self.ended += record.data.iter().filter(|b| **b == b'\n').count() as u64;
        if let Some(last) = record.data.last() {
            self.open = *last != b'\n';
        }
    }

    fn lines(&self) -> u64 {
        self.ended + u64::from(self.open)
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
        let check = |keep: u64, expected: &str| {
            let records = ["one\ntw", "o\nthr", "ee\nfour"].map(record);
            let mut count = Count::default();
            for record in &records {
                count.add(record);
            }
            let mut skip = Skip(count.lines().saturating_sub(keep));
            let seen = records.into_iter().filter_map(|record| skip.cut(record));
            let seen: Vec<u8> = seen.flat_map(|record| record.data.to_vec()).collect();
            assert_eq!(String::from_utf8(seen).unwrap(), expected, "{keep}");
        };
        check(0, "");
        check(1, "four");
        check(2, "three\nfour");
        check(3, "two\nthree\nfour");
        check(9, "one\ntwo\nthree\nfour");
        check(u64::MAX, "one\ntwo\nthree\nfour");
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
