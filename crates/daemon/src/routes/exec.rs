//! `exec`: one more process in a running VM, over a WebSocket.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use futures::StreamExt as _;
use offshoot_agent_proto::client::{ExecSession, OutputStream, ProcessEvent, StartRefusal};
use offshoot_agent_proto::v1;
use offshoot_api::channel::{self, ExecStart, Status};
use offshoot_api::error::ApiError;
use offshoot_api::vm::VmPath;
use offshoot_engine::owner::VmHandle;
use offshoot_engine::run::Live;
use offshoot_model::{ErrorKind, ProcessConfig, VmName};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::session::{feed, finish, prepared, send};
use super::vms::live;
use crate::app::Shared;
use crate::error::Answer;
use crate::extract::{Named, Upgrade};

/// How long a client may take to say what it wants after it connected.
const START_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(exec))
}

#[utoipa::path(get, path = "/v1/vms/{vm}/exec", params(VmPath),
    responses((status = 101, body = ExecStart)))]
async fn exec(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let handle = app.engine.find(name.as_str())?;
    let live = live(&handle)?;
    Ok(prepared(upgrade).on_upgrade(move |socket| session(socket, handle, live)))
}

fn failed(code: i32, kind: ErrorKind, message: impl Into<String>) -> Status {
    Status::Failed {
        code,
        error: ApiError::new(kind, message),
    }
}

async fn session(socket: WebSocket, handle: VmHandle, live: Live) {
    let (mut sending, mut receiving) = socket.split();
    let first = tokio::time::timeout(START_TIMEOUT, receiving.next()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        return finish(
            &mut sending,
            &failed(
                125,
                ErrorKind::InvalidRequest,
                "the first message is not what to run",
            ),
        )
        .await;
    };
    let start: ExecStart = match serde_json::from_str(&text) {
        Ok(start) => start,
        Err(error) => {
            let message = format!("cannot understand what to run: {error}");
            return finish(&mut sending, &failed(125, ErrorKind::InvalidRequest, message)).await;
        }
    };
    if start.process.argv.first().is_none_or(String::is_empty) {
        return finish(
            &mut sending,
            &failed(125, ErrorKind::InvalidRequest, "there is nothing to run"),
        )
        .await;
    }
    let of_the_vm = handle
        .view
        .borrow()
        .definition
        .process
        .clone()
        .unwrap_or_default();
    let config = over(start.process, &of_the_vm);
    let stdin = config.stdin;
    let mut process = v1::Process::from(&config);
    process.window = start.window.map(|size| v1::WindowSize {
        rows: size.height.into(),
        cols: size.width.into(),
    });
    let ExecSession { input, mut events } = match live.agent.exec(process).await {
        Ok(session) => session,
        Err(error) => {
            let status = Status::Failed {
                code: 125,
                error: ApiError::from_explained(&error),
            };
            return finish(&mut sending, &status).await;
        }
    };
    let detach = start.detach;
    let show = async {
        loop {
            let status = match events.next().await {
                Some(Ok(ProcessEvent::Started { .. })) if detach => Status::Exited { code: 0 },
                Some(Ok(ProcessEvent::Output { stream, data, .. })) => {
                    let channel = match stream {
                        OutputStream::Stdout => channel::STDOUT,
                        OutputStream::Stderr => channel::STDERR,
                    };
                    if send(&mut sending, channel, &data).await.is_err() {
                        return;
                    }
                    continue;
                }
                Some(Ok(ProcessEvent::Started { .. } | ProcessEvent::Lost { .. })) => continue,
                Some(Ok(ProcessEvent::Exited { status })) => Status::Exited { code: status },
                Some(Ok(ProcessEvent::Refused(StartRefusal { status, message }))) => {
                    failed(status, ErrorKind::InvalidRequest, message)
                }
                Some(Err(error)) => broken(&handle, &error),
                None => failed(125, ErrorKind::Internal, "the session ended without a status"),
            };
            return finish(&mut sending, &status).await;
        }
    };
    tokio::select! {
        () = feed(&mut receiving, &input, stdin) => {}
        () = show => {}
    }
}

/// What a client is told when the agent is lost in the middle.
fn broken(handle: &VmHandle, error: &offshoot_agent_proto::client::CallError) -> Status {
    let vm = handle.view.borrow();
    if vm.life.state.has_vmm() {
        return Status::Failed {
            code: 125,
            error: ApiError::from_explained(error),
        };
    }
    failed(137, ErrorKind::WrongState, format!("VM `{}` stopped", vm.name))
}

/// A process in a VM: what the client leaves out is as the main process has it.
fn over(mut process: ProcessConfig, of_the_vm: &ProcessConfig) -> ProcessConfig {
    process.env = of_the_vm.env.iter().chain(&process.env).cloned().collect();
    if process.working_dir.is_empty() {
        process.working_dir.clone_from(&of_the_vm.working_dir);
    }
    if process.user.is_empty() {
        process.user.clone_from(&of_the_vm.user);
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_the_main_process_has_it() {
        let vm = ProcessConfig {
            env: vec!["A=1".parse().unwrap()],
            user: "app".into(),
            working_dir: "/srv".into(),
            ..ProcessConfig::default()
        };
        let asked = ProcessConfig {
            env: vec!["B=2".parse().unwrap()],
            user: "root".into(),
            ..ProcessConfig::default()
        };
        let process = over(asked, &vm);
        assert_eq!(
            process.env.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["A=1", "B=2"]
        );
        assert_eq!(
            (process.user.as_str(), process.working_dir.as_str()),
            ("root", "/srv")
        );
    }
}
