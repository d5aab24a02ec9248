//! `attach`: the main process over a WebSocket.

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use offshoot_agent_proto::client::InputSender;
use offshoot_api::channel::{self, Status, WindowSize};
use offshoot_api::error::ApiError;
use offshoot_api::vm::{AttachQuery, VmPath};
use offshoot_engine::output::{Follow, Follower, RecordKind};
use offshoot_engine::owner::VmHandle;
use offshoot_model::{ErrorKind, VmName, VmState};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::Answer;
use crate::extract::{Named, Query, Upgrade};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(attach))
}

/// The half of a session that sends.
pub(super) type Sending = SplitSink<WebSocket, Message>;
/// The half of a session that receives.
pub(super) type Receiving = SplitStream<WebSocket>;

/// Agrees on the subprotocol and the sizes.
pub(super) fn prepared(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade
        .protocols([channel::SUBPROTOCOL])
        .max_message_size(channel::MAX_MESSAGE)
        .max_frame_size(channel::MAX_MESSAGE)
        .write_buffer_size(0)
}

/// Sends data on a channel, cut to what one message takes.
pub(super) async fn send(sending: &mut Sending, channel: u8, data: &[u8]) -> Result<(), axum::Error> {
    for chunk in data.chunks(channel::MAX_MESSAGE - 1) {
        let mut message = Vec::with_capacity(chunk.len() + 1);
        message.push(channel);
        message.extend_from_slice(chunk);
        sending.send(Message::Binary(message.into())).await?;
    }
    Ok(())
}

/// Sends the last message and closes.
pub(super) async fn finish(sending: &mut Sending, status: &Status) {
    let text = serde_json::to_vec(status).unwrap_or_default();
    if send(sending, channel::STATUS, &text).await.is_ok() {
        let _ = sending.send(Message::Close(None)).await;
        let _ = sending.flush().await;
    }
}

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    Stdin(Bytes),
    CloseStdin,
    Resize(WindowSize),
    Signal(u32),
}

/// Reads one message; `None` for what is not understood and does no harm.
pub(super) fn parse(message: &Bytes) -> Option<Input> {
    let (kind, data) = (*message.first()?, message.slice(1..));
    match kind {
        channel::STDIN => Some(Input::Stdin(data)),
        channel::RESIZE => serde_json::from_slice(&data).ok().map(Input::Resize),
        channel::SIGNAL => std::str::from_utf8(&data).ok()?.parse().ok().map(Input::Signal),
        channel::CLOSE if data.first() == Some(&channel::STDIN) => Some(Input::CloseStdin),
        _ => None,
    }
}

/// Passes what a client sends to a process, until the client or the process goes away.
pub(super) async fn feed(receiving: &mut Receiving, input: &InputSender, stdin: bool) {
    while let Some(Ok(message)) = receiving.next().await {
        let Message::Binary(bytes) = message else { continue };
        let goes_on = match parse(&bytes) {
            Some(Input::Stdin(data)) if stdin => input.stdin(data).await,
            Some(Input::CloseStdin) if stdin => input.close_stdin().await,
            Some(Input::Resize(size)) => input.resize(size.height.into(), size.width.into()).await,
            Some(Input::Signal(signal)) => input.signal(signal).await,
            Some(Input::Stdin(_) | Input::CloseStdin) | None => true,
        };
        if !goes_on {
            // The process is gone; what the client still says goes nowhere, but its leaving must be noticed.
            while let Some(Ok(_)) = receiving.next().await {}
        }
    }
}

#[utoipa::path(get, path = "/v1/vms/{vm}/attach", params(VmPath, AttachQuery),
    responses((status = 101)))]
async fn attach(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<AttachQuery>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let handle = app.engine.find(name.as_str())?;
    // Before the answer: a client may start the VM as soon as it has it, and must miss nothing.
    let follower = handle.output.follow(if query.logs {
        Follow::Everything
    } else {
        Follow::FromEnd
    });
    let began = handle.view.borrow().clone();
    let began = (began.life.state, began.life.started_ms);
    Ok(prepared(upgrade).on_upgrade(move |socket| relay(socket, handle, follower, query.stdin, began)))
}

async fn relay(
    socket: WebSocket,
    handle: VmHandle,
    mut follower: Follower,
    stdin: bool,
    began: (VmState, Option<u64>),
) {
    let (mut sending, mut receiving) = socket.split();
    let gone = {
        let handle = handle.clone();
        async move {
            let mut live = handle.live.clone();
            let agent = live
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|live| live.clone());
            match agent {
                Some(live) => {
                    let main = live.agent.main_input();
                    feed(&mut receiving, &main.input, stdin).await;
                }
                None => while let Some(Ok(_)) = receiving.next().await {},
            }
        }
    };
    tokio::select! {
        // Detached, or died: the VM does not care.
        () = gone => {}
        () = show(&handle, &mut follower, &mut sending, began) => {}
    }
}

/// Shows the output until the run that was waited for, or was under way, has ended.
async fn show(
    handle: &VmHandle,
    follower: &mut Follower,
    sending: &mut Sending,
    (state, started_ms): (VmState, Option<u64>),
) {
    let mut view = handle.view.clone();
    loop {
        let record = tokio::select! {
            biased;
            record = follower.next() => record.map(Some),
            ended = view.wait_for(|vm| {
                !vm.life.state.has_vmm() && (state.has_vmm() || vm.life.started_ms != started_ms)
            }) => {
                drop(ended);
                follower.try_next()
            }
        };
        let record = match record {
            Ok(Some(record)) => record,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "cannot read a VM's output");
                break;
            }
        };
        let channel = match record.kind {
            RecordKind::Stdout => channel::STDOUT,
            RecordKind::Stderr => channel::STDERR,
            RecordKind::Begin | RecordKind::Lost => continue,
        };
        if send(sending, channel, &record.data).await.is_err() {
            return;
        }
    }
    finish(sending, &status(handle)).await;
}

fn status(handle: &VmHandle) -> Status {
    let vm = handle.view.borrow().clone();
    match (&vm.life.exit, vm.life.state) {
        (exit, VmState::Failed) => {
            let mut messages = vm.life.failure.clone();
            let message = if messages.is_empty() {
                "the VM did not start".into()
            } else {
                messages.remove(0)
            };
            let error = ApiError {
                causes: messages,
                ..ApiError::new(ErrorKind::Internal, message)
            };
            Status::Failed {
                code: exit.map_or(125, |exit| exit.code),
                error,
            }
        }
        (Some(exit), _) => Status::Exited { code: exit.code },
        (None, _) => Status::Failed {
            code: 125,
            error: ApiError::new(ErrorKind::WrongState, format!("VM `{}` did not run", vm.name)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_by_their_first_byte() {
        let check = |bytes: &'static [u8], expected: Option<Input>| {
            assert_eq!(parse(&Bytes::from_static(bytes)), expected, "{bytes:?}");
        };
        check(b"\0hi", Some(Input::Stdin(Bytes::from_static(b"hi"))));
        check(b"\xff\0", Some(Input::CloseStdin));
        check(b"\xff\x01", None);
        check(
            b"\x04{\"Width\":80,\"Height\":24}",
            Some(Input::Resize(WindowSize {
                width: 80,
                height: 24,
            })),
        );
        check(b"\x04{}", None);
        check(b"\x0515", Some(Input::Signal(15)));
        check(b"\x05-1", None);
        check(b"\x09", None);
        check(b"", None);
    }
}
