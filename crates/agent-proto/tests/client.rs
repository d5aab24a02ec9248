//! The client against agents that behave, misbehave and vanish, in one process.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use offshoot_agent_proto::client::{
    AgentClient, CallError, MainStart, OutputStream, ProcessEvent, SessionCount,
};
use offshoot_agent_proto::limits::{MAX_CHUNK, MAX_REPLY};
use offshoot_agent_proto::serve::{serve, service};
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::agent_server::Agent;
use offshoot_model::{ErrorKind, Explain};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Mutex;
use tonic::{Request, Response, Status, Streaming};

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers with what it was given.
#[derive(Default)]
struct Puppet {
    hello: v1::HelloReply,
    start: v1::StartMainReply,
    exec: Mutex<Vec<v1::ExecReply>>,
    copy_out: Mutex<Vec<v1::CopyOutReply>>,
    input: Mutex<Vec<v1::ProcessInput>>,
}

fn boxed<T: Send + 'static>(replies: Vec<T>) -> Response<Replies<T>> {
    Response::new(stream::iter(replies.into_iter().map(Ok)).boxed())
}

#[tonic::async_trait]
impl Agent for Puppet {
    type MainOutputStream = Replies<v1::MainOutputReply>;
    type ExecStream = Replies<v1::ExecReply>;
    type CopyOutStream = Replies<v1::CopyOutReply>;
    type SshStream = Replies<v1::SshBytes>;
    type SessionsStream = Replies<v1::SessionsReply>;

    /// Says how many keys it was told, then what it gets, until the stream ends.
    async fn ssh(
        &self,
        request: Request<Streaming<v1::SshRequest>>,
    ) -> Result<Response<Self::SshStream>, Status> {
        let answers = request.into_inner().map(|message| {
            let data = match message?.what {
                Some(v1::ssh_request::What::Open(open)) => format!("{} ", open.authorized_keys.len()).into(),
                Some(v1::ssh_request::What::Data(data)) => data,
                None => return Err(Status::invalid_argument("nothing")),
            };
            Ok(v1::SshBytes { data })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn sessions(
        &self,
        _: Request<v1::SessionsRequest>,
    ) -> Result<Response<Self::SessionsStream>, Status> {
        let counts = [(0, 1), (2, 1)].map(|(ssh, exec)| v1::SessionsReply { ssh, exec });
        Ok(boxed(counts.to_vec()))
    }

    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        Ok(Response::new(self.hello.clone()))
    }

    async fn configure(
        &self,
        _: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureReply>, Status> {
        Err(Status::failed_precondition("no disk \x1b[2J"))
    }

    async fn rehearse(&self, _: Request<v1::RehearseRequest>) -> Result<Response<v1::RehearseReply>, Status> {
        Err(Status::unimplemented("rehearse"))
    }

    async fn warm(&self, _: Request<v1::WarmRequest>) -> Result<Response<v1::WarmReply>, Status> {
        Err(Status::unimplemented("warm"))
    }

    async fn start_main(
        &self,
        _: Request<v1::StartMainRequest>,
    ) -> Result<Response<v1::StartMainReply>, Status> {
        Ok(Response::new(self.start.clone()))
    }

    async fn main_output(
        &self,
        _: Request<v1::MainOutputRequest>,
    ) -> Result<Response<Self::MainOutputStream>, Status> {
        let lost = v1::MainOutputReply {
            what: Some(v1::main_output_reply::What::Lost(5)),
        };
        Ok(Response::new(
            stream::iter([Ok(lost)]).chain(stream::pending()).boxed(),
        ))
    }

    async fn main_input(
        &self,
        request: Request<Streaming<v1::ProcessInput>>,
    ) -> Result<Response<v1::MainInputReply>, Status> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.message().await? {
            self.input.lock().await.push(message);
        }
        Ok(Response::new(v1::MainInputReply {}))
    }

    async fn exec(
        &self,
        _: Request<Streaming<v1::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        Ok(boxed(std::mem::take(&mut *self.exec.lock().await)))
    }

    async fn signal_main(&self, _: Request<v1::SignalRequest>) -> Result<Response<v1::SignalReply>, Status> {
        std::future::pending().await
    }

    async fn copy_in(
        &self,
        _: Request<Streaming<v1::CopyInRequest>>,
    ) -> Result<Response<v1::CopyInReply>, Status> {
        Err(Status::not_found("no such folder"))
    }

    async fn copy_out(
        &self,
        _: Request<v1::CopyOutRequest>,
    ) -> Result<Response<Self::CopyOutStream>, Status> {
        Ok(boxed(std::mem::take(&mut *self.copy_out.lock().await)))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownReply>, Status> {
        Ok(Response::new(v1::ShutdownReply { clean: true }))
    }
}

async fn connect(puppet: Puppet) -> (AgentClient, Arc<Puppet>, tokio::task::JoinHandle<()>) {
    let (host, guest) = tokio::io::duplex(64 << 10);
    let puppet = Arc::new(puppet);
    let service = service(Arc::clone(&puppet));
    let server = tokio::spawn(async move { drop(serve(guest, service).await) });
    (AgentClient::connect(host).await.unwrap(), puppet, server)
}

fn output(data: Bytes, stream: i32) -> v1::ExecReply {
    v1::ExecReply {
        what: Some(v1::exec_reply::What::Output(v1::Output {
            stream,
            data,
            offset: 0,
        })),
    }
}

#[tokio::test]
async fn answers_are_passed_on_and_texts_made_harmless() {
    let (client, _, _server) = connect(Puppet {
        hello: v1::HelloReply {
            kernel_release: "6\x07".into(),
            main: 2,
            ..v1::HelloReply::default()
        },
        start: v1::StartMainReply {
            what: Some(v1::start_main_reply::What::Pid(12)),
        },
        ..Puppet::default()
    })
    .await;
    let hello = client.hello().await.unwrap();
    assert_eq!(
        (hello.kernel_release.as_str(), hello.main),
        ("6\u{fffd}", v1::MainState::Exited)
    );
    let init = v1::start_main_request::What::Init(true);
    assert_eq!(
        client.start_main(init).await.unwrap(),
        MainStart::Started { pid: 12 }
    );
    let refused = client
        .configure(v1::ConfigureRequest::default())
        .await
        .unwrap_err();
    assert_eq!(
        (refused.kind(), refused.to_string().as_str()),
        (ErrorKind::WrongState, "no disk \u{fffd}[2J")
    );
    let not_found = client.copy_in("/x", &[0_u8; 1 << 20][..]).await.unwrap_err();
    assert_eq!(not_found.kind(), ErrorKind::NotFound);
    assert!(client.shutdown(Duration::ZERO).await.unwrap());
}

#[tokio::test]
async fn input_arrives_in_chunks_and_in_order() {
    let (client, puppet, _server) = connect(Puppet::default()).await;
    let main = client.main_input();
    assert!(main.input.stdin(Bytes::from(vec![1; 2 * MAX_CHUNK + 1])).await);
    assert!(main.input.resize(1, 2).await && main.input.close_stdin().await);
    main.finish().await.unwrap();
    let sizes: Vec<usize> = puppet
        .input
        .lock()
        .await
        .iter()
        .map(|input| match &input.what {
            Some(v1::process_input::What::Stdin(bytes)) => bytes.len(),
            _ => 0,
        })
        .collect();
    assert_eq!(sizes, [MAX_CHUNK, MAX_CHUNK, 1, 0, 0]);
}

#[tokio::test]
async fn what_makes_no_sense_is_an_error_and_the_end() {
    let exited = v1::ExecReply {
        what: Some(v1::exec_reply::What::Exited(3)),
    };
    let check = async |replies: Vec<v1::ExecReply>| {
        let (client, puppet, _server) = connect(Puppet::default()).await;
        *puppet.exec.lock().await = replies;
        let mut events = client.exec(v1::Process::default()).await.unwrap().events;
        let mut seen = Vec::new();
        while let Some(event) = events.next().await {
            seen.push(event);
        }
        seen
    };
    let fine = check(vec![
        output(Bytes::from_static(b"a"), 1),
        exited.clone(),
        exited.clone(),
    ])
    .await;
    assert!(
        matches!(
            &fine[..],
            [
                Ok(ProcessEvent::Output {
                    stream: OutputStream::Stderr,
                    ..
                }),
                Ok(ProcessEvent::Exited { status: 3 })
            ]
        ),
        "{fine:?}"
    );
    let is_bad = |seen: &[Result<ProcessEvent, CallError>]| matches!(seen, [Err(CallError::BadReply { .. })]);
    assert!(is_bad(
        &check(vec![output(Bytes::new(), 9), exited.clone()]).await
    ));
    assert!(is_bad(
        &check(vec![v1::ExecReply { what: None }, exited.clone()]).await
    ));
    assert!(matches!(&check(vec![]).await[..], [Err(CallError::Gone { .. })]));

    let (client, puppet, _server) = connect(Puppet::default()).await;
    let stat = v1::copy_out_reply::What::Stat(v1::PathStat::default());
    *puppet.copy_out.lock().await = vec![v1::CopyOutReply {
        what: Some(v1::copy_out_reply::What::Tar(Bytes::new())),
    }];
    assert!(matches!(
        client.copy_out("/x").await,
        Err(CallError::BadReply { .. })
    ));
    *puppet.copy_out.lock().await = vec![
        v1::CopyOutReply {
            what: Some(stat.clone()),
        },
        v1::CopyOutReply { what: Some(stat) },
    ];
    let mut copied = client.copy_out("/x").await.unwrap();
    assert!(matches!(
        copied.tar.next().await,
        Some(Err(CallError::BadReply { .. }))
    ));
    assert!(copied.tar.next().await.is_none());
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_before_it_is_read() {
    // A hostile agent has no limits of its own.
    let puppet = Arc::new(Puppet::default());
    *puppet.exec.lock().await = vec![output(Bytes::from(vec![0; MAX_REPLY + 1]), 0)];
    let (host, guest) = tokio::io::duplex(64 << 10);
    let service = v1::agent_server::AgentServer::from_arc(Arc::clone(&puppet));
    tokio::spawn(async move { drop(serve(guest, service).await) });
    let client = AgentClient::connect(host).await.unwrap();
    let mut events = client.exec(v1::Process::default()).await.unwrap().events;
    let error = events.next().await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::BadReply { .. }), "{error:?}");
}

#[tokio::test]
async fn a_guest_that_vanishes_ends_every_call() {
    let (client, _, server) = connect(Puppet::default()).await;
    let mut output = client.main_output(0).await.unwrap();
    assert!(matches!(
        output.next().await,
        Some(Ok(ProcessEvent::Lost { bytes: 5 }))
    ));
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.signal_main(9).await }
    });
    server.abort();
    let within = |future| tokio::time::timeout(Duration::from_secs(10), future);
    assert!(matches!(
        within(output.next()).await,
        Ok(Some(Err(CallError::Gone { .. })))
    ));
    assert!(matches!(waiting.await.unwrap(), Err(CallError::Gone { .. })));
    assert!(matches!(client.hello().await, Err(CallError::Gone { .. })));
}

#[tokio::test]
async fn an_ssh_connection_is_a_stream_of_bytes() {
    let (client, _, _server) = connect(Puppet::default()).await;
    let connection = client.ssh(vec!["a".into(), "b".into()]).await.unwrap();
    let (mut from_guest, mut to_guest) = tokio::io::split(connection);
    let sent: Vec<u8> = (0..3 * MAX_CHUNK + 7).map(|n| n as u8).collect();
    let writing = async {
        to_guest.write_all(&sent).await.unwrap();
        to_guest.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let (_, read) = tokio::join!(writing, from_guest.read_to_end(&mut received));
    read.unwrap();
    assert_eq!(received, [&b"2 "[..], &sent].concat());
}

#[tokio::test]
async fn sessions_are_counted_until_the_agent_is_gone() {
    let (client, _, _server) = connect(Puppet::default()).await;
    let mut counts = client.sessions().await.unwrap();
    for expected in [SessionCount { ssh: 0, exec: 1 }, SessionCount { ssh: 2, exec: 1 }] {
        assert_eq!(counts.next().await.unwrap().unwrap(), expected);
    }
    assert!(matches!(
        counts.next().await,
        Some(Err(CallError::Gone { call: "sessions", .. }))
    ));
    assert!(counts.next().await.is_none());
}
