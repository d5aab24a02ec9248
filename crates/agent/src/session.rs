//! Processes and the calls they belong to: the main process and its log, exec sessions and their streams.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use offshoot_agent_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

use crate::count::Open;
use crate::output_log::OutputLog;
use crate::process::{self, Sink};
use crate::spawn::Spawned;

/// Messages between a process and its connection; a few, because each is a whole chunk.
pub(crate) const QUEUE: usize = 4;

/// What an exec's call answers with.
pub(crate) type ExecReplies = mpsc::Sender<Result<v1::ExecReply, Status>>;

/// The main process writes into its log, whoever reads.
struct LogSink(Arc<OutputLog>);

impl Sink for LogSink {
    async fn output(&mut self, stream: v1::Stream, data: Bytes) {
        self.0.append(stream, &data).await;
    }

    async fn gone(&self) {
        // Somebody may always come back.
        pending::<()>().await;
    }

    const TAKES_PIPES_ALONG: bool = false;
}

/// An exec writes to its caller.
struct ReplySink {
    replies: ExecReplies,
    offset: u64,
}

impl Sink for ReplySink {
    async fn output(&mut self, stream: v1::Stream, data: Bytes) {
        let offset = self.offset;
        self.offset += data.len() as u64;
        let output = v1::Output {
            stream: stream.into(),
            data,
            offset,
        };
        // A caller that is gone is noticed by `gone`.
        drop(
            self.replies
                .send(Ok(reply(v1::exec_reply::What::Output(output))))
                .await,
        );
    }

    async fn gone(&self) {
        self.replies.closed().await;
    }

    const TAKES_PIPES_ALONG: bool = false;
}

/// An answer of an exec.
pub(crate) fn reply(what: v1::exec_reply::What) -> v1::ExecReply {
    v1::ExecReply { what: Some(what) }
}

/// Attends the main process until it ends; then its status is in the log.
pub(crate) async fn main_process(
    spawned: Spawned,
    input: mpsc::Receiver<v1::ProcessInput>,
    log: Arc<OutputLog>,
    exited: &AtomicBool,
) {
    let end = process::run(spawned, input, &mut LogSink(Arc::clone(&log))).await;
    exited.store(true, Ordering::Release);
    log.finish(end.status());
}

/// Attends an exec until it ends. It is counted as long as its caller is there: the process may live on without.
pub(crate) async fn exec(
    spawned: Spawned,
    input: mpsc::Receiver<v1::ProcessInput>,
    replies: ExecReplies,
    open: Open,
) {
    let started = v1::exec_reply::What::StartedPid(crate::guest::pid(&spawned));
    drop(replies.send(Ok(reply(started))).await);
    let mut sink = ReplySink {
        replies: replies.clone(),
        offset: 0,
    };
    let mut run = pin!(process::run(spawned, input, &mut sink));
    let mut open = Some(open);
    let end = loop {
        tokio::select! {
            end = &mut run => break end,
            () = replies.closed(), if open.is_some() => open = None,
        }
    };
    drop(
        replies
            .send(Ok(reply(v1::exec_reply::What::Exited(end.status()))))
            .await,
    );
    drop(open);
}
