//! Talks with the agent behind a virtio-serial socket, for debugging a guest by hand.
//!
//! ```text
//! agent-shell SOCKET hello
//! agent-shell SOCKET configure VM_ID HOSTNAME ROOT OVERLAY_SERIAL [WORK_SERIAL]     ROOT: block:SERIAL pmem:N virtiofs:TAG copy:SERIAL
//! agent-shell SOCKET start COMMAND…  |  start --init
//! agent-shell SOCKET logs [OFFSET]
//! agent-shell SOCKET exec COMMAND…            (standard input is passed on)
//! agent-shell SOCKET cp-in FOLDER < TAR  |  cp-out PATH > TAR
//! agent-shell SOCKET signal NUMBER  |  shutdown GRACE_MS
//! ```

use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use offshoot_agent_proto::client::{AgentClient, MainStart, OutputStream, ProcessEvent, ProcessEvents};
use offshoot_agent_proto::limits::MAX_CHUNK;
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::configure_request::Root;
use tokio::io::AsyncReadExt;

type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words).await {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            report(&format!("agent-shell: {error}"));
            ExitCode::from(125)
        }
    }
}

fn report(line: &str) {
    // Nobody reads what nobody can write.
    let _ = writeln!(std::io::stderr(), "{line}");
}

async fn run(words: &[&str]) -> Outcome<i32> {
    let [socket, verb, rest @ ..] = words else {
        return Err("usage: agent-shell SOCKET VERB …; see the source".into());
    };
    let start = Instant::now();
    let client = AgentClient::connect_unix_link(Path::new(socket)).await?;
    let connected = start.elapsed();
    match (*verb, rest) {
        ("hello", []) => {
            let hello = client.hello().await?;
            report(&format!(
                "{hello:?}, connected after {connected:?}, answered after {:?}",
                start.elapsed()
            ));
        }
        ("configure", [id, hostname, root, overlay, work @ ..]) => {
            let stages = client
                .configure(request(id, hostname, root, overlay, work.first().unwrap_or(&""))?)
                .await?;
            report(&format!("{stages:?}"));
        }
        ("start", ["--init"]) => report(&format!(
            "{:?}",
            client
                .start_main(v1::start_main_request::What::Init(true))
                .await?
        )),
        ("start", command) => {
            let process = v1::start_main_request::What::Process(process(command));
            match client.start_main(process).await? {
                MainStart::Started { pid } => report(&format!("pid {pid}")),
                MainStart::Refused(refusal) => {
                    report(&refusal.message);
                    return Ok(refusal.status);
                }
            }
        }
        ("logs", offset) => {
            let offset = offset.first().map_or(Ok(0), |offset| offset.parse())?;
            return print(client.main_output(offset).await?).await;
        }
        ("exec", command) => {
            let session = client.exec(process(command)).await?;
            let input = session.input;
            tokio::spawn(async move {
                let mut stdin = tokio::io::stdin();
                let mut buffer = BytesMut::with_capacity(MAX_CHUNK);
                while let Ok(1..) = stdin.read_buf(&mut buffer).await {
                    buffer.reserve(MAX_CHUNK);
                    if !input.stdin(buffer.split().freeze()).await {
                        return;
                    }
                }
                input.close_stdin().await;
            });
            return print(session.events).await;
        }
        ("cp-in", [folder]) => report(&format!(
            "{} entries",
            client.copy_in(folder, tokio::io::stdin()).await?
        )),
        ("cp-out", [path]) => {
            let mut copied = client.copy_out(path).await?;
            report(&format!("{:?}", copied.stat));
            while let Some(bytes) = copied.tar.next().await {
                std::io::stdout().write_all(&bytes?)?;
            }
        }
        ("signal", [number]) => client.signal_main(number.parse()?).await?,
        ("shutdown", [grace_ms]) => {
            let clean = client.shutdown(Duration::from_millis(grace_ms.parse()?)).await?;
            report(&format!("clean: {clean}, after {:?}", start.elapsed()));
        }
        _ => return Err(format!("cannot do `{verb}` with that; see the source").into()),
    }
    Ok(0)
}

fn request(id: &str, hostname: &str, root: &str, overlay: &str, work: &str) -> Outcome<v1::ConfigureRequest> {
    let (kind, name) = root.split_once(':').ok_or("ROOT is KIND:NAME")?;
    let name = name.to_owned();
    let root = match kind {
        "block" => Root::RootBlockSerial(name),
        "pmem" => Root::RootPmemIndex(name.parse()?),
        "virtiofs" => Root::RootVirtiofsTag(name),
        "copy" => Root::RootCopySerial(name),
        _ => return Err("the root's kind is block, pmem, virtiofs or copy".into()),
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(v1::ConfigureRequest {
        vm_id: id.to_owned(),
        hostname: hostname.to_owned(),
        realtime_ns: u64::try_from(now.as_nanos())?,
        root: Some(root),
        overlay_serial: overlay.to_owned(),
        work_serial: work.to_owned(),
        ..v1::ConfigureRequest::default()
    })
}

fn process(command: &[&str]) -> v1::Process {
    v1::Process {
        argv: command.iter().map(ToString::to_string).collect(),
        tty: std::io::stdin().is_terminal(),
        stdin: true,
        window: Some(v1::WindowSize { rows: 24, cols: 80 }),
        ..v1::Process::default()
    }
}

/// Prints what a process writes and returns its status.
async fn print(mut events: ProcessEvents) -> Outcome<i32> {
    while let Some(event) = events.next().await {
        match event? {
            ProcessEvent::Started { .. } => {}
            ProcessEvent::Output {
                stream: OutputStream::Stdout,
                data,
                ..
            } => std::io::stdout().write_all(&data)?,
            ProcessEvent::Output {
                stream: OutputStream::Stderr,
                data,
                ..
            } => std::io::stderr().write_all(&data)?,
            ProcessEvent::Lost { bytes } => report(&format!("({bytes} bytes lost)")),
            ProcessEvent::Exited { status } => return Ok(status),
            ProcessEvent::Refused(refusal) => {
                report(&refusal.message);
                return Ok(refusal.status);
            }
        }
    }
    Err("the stream ended without a status".into())
}
