//! Forwarded connections, both ways, of every kind.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::process::{Child, Command};

use super::{PATIENCE, Rig, done, text, until};

/// Sends back what it gets, until it gets no more.
async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    stream.write_all(&all).await.unwrap();
    stream.shutdown().await.unwrap();
}

async fn tcp_echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    port
}

fn unix_echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
}

/// Whether what is sent comes back, and then the end.
async fn check(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let sent = vec![7; 300_000];
    let there_and_back = async {
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        assert!(back == sent, "{} of {} bytes", back.len(), sent.len());
    };
    tokio::time::timeout(PATIENCE, there_and_back)
        .await
        .expect("stuck");
}

fn forward(rig: &Rig, options: &[&str]) -> Child {
    let mut command = rig.ssh();
    command
        .arg("-N")
        .args(["-o", "ExitOnForwardFailure=yes"])
        .args(options);
    command.stderr(Stdio::piped()).spawn().unwrap()
}

#[tokio::test]
async fn local_ports_and_paths_lead_into_the_guest() {
    let Some(rig) = Rig::new().await else { return };
    let port = tcp_echo().await;
    unix_echo(&rig.path("there.sock"));
    let (to_port, to_name, to_path) = (rig.path("port"), rig.path("name"), rig.path("path"));
    let _ssh = forward(
        &rig,
        &[
            "-L",
            &format!("{}:127.0.0.1:{port}", to_port.display()),
            "-L",
            &format!("{}:localhost:{port}", to_name.display()),
            "-L",
            &format!("{}:{}", to_path.display(), rig.path("there.sock").display()),
        ],
    );
    for path in [to_port, to_name, to_path] {
        until(|| path.exists()).await;
        check(UnixStream::connect(&path).await.unwrap()).await;
    }
    // Where nobody listens, and what has no name.
    for target in ["127.0.0.1:1", "no-such-name.invalid:80"] {
        let mut command = rig.client("ssh", "ed25519");
        let output = done(command.args(["-W", target, "root@127.0.0.1"])).await;
        let text = text(&output.stderr);
        assert!(text.contains("stdio forwarding failed"), "{text}");
    }
}

#[tokio::test]
async fn ports_and_paths_of_the_guest_lead_to_the_client() {
    let Some(rig) = Rig::new().await else { return };
    let port = tcp_echo().await;
    unix_echo(&rig.path("here.sock"));
    let there = rig.path("there.sock");
    let mut ssh = forward(
        &rig,
        &[
            "-R",
            &format!("0:127.0.0.1:{port}"),
            "-R",
            &format!("{}:{}", there.display(), rig.path("here.sock").display()),
        ],
    );
    let mut lines = BufReader::new(ssh.stderr.take().unwrap()).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line())
        .await
        .expect("silent");
    let line = line.unwrap().unwrap();
    // "Allocated port 12345 for remote forward to ..."
    let bound: u16 = line
        .split(' ')
        .nth(2)
        .unwrap()
        .parse()
        .unwrap_or_else(|_| panic!("{line}"));
    check(TcpStream::connect(("127.0.0.1", bound)).await.unwrap()).await;
    until(|| there.exists()).await;
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&there).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    check(UnixStream::connect(&there).await.unwrap()).await;
    ssh.kill().await.unwrap();
    until(|| !there.exists()).await;
    assert!(TcpStream::connect(("127.0.0.1", bound)).await.is_err());
    // A port that is taken is refused.
    let mut taken = forward(&rig, &["-R", &format!("127.0.0.1:{port}:127.0.0.1:{port}")]);
    let status = tokio::time::timeout(PATIENCE, taken.wait())
        .await
        .expect("accepted");
    assert_eq!(status.unwrap().code(), Some(255));
}

#[tokio::test]
async fn rights_on_forwarded_sockets_are_the_users() {
    let Some(rig) = Rig::new().await else { return };
    let private = rig.path("private.sock");
    unix_echo(&private);
    std::fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let local = rig.path("local");
    let mut command = rig.client("ssh", "ed25519");
    command
        .arg("-N")
        .arg("-L")
        .arg(format!("{}:{}", local.display(), private.display()))
        .arg("www-data@127.0.0.1");
    let _ssh = command.stderr(Stdio::null()).spawn().unwrap();
    until(|| local.exists()).await;
    let mut stream = UnixStream::connect(&local).await.unwrap();
    let mut nothing = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut nothing)).await;
    assert!(matches!(read.expect("stuck"), Ok(0) | Err(_)));
    let mut low = rig.client("ssh", "ed25519");
    low.args([
        "-N",
        "-o",
        "ExitOnForwardFailure=yes",
        "-R",
        "127.0.0.1:1:127.0.0.1:1",
    ]);
    let output = done(low.arg("www-data@127.0.0.1")).await;
    assert_eq!(output.status.code(), Some(255));
}

#[tokio::test]
async fn the_clients_agent_is_in_the_guest_while_it_is_there() {
    let Some(rig) = Rig::new().await else { return };
    let socket = rig.path("agent.sock");
    let mut agent = Command::new("ssh-agent");
    let _agent = agent
        .arg("-D")
        .arg("-a")
        .arg(&socket)
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until(|| socket.exists()).await;
    let mut add = Command::new("ssh-add");
    add.arg("-q").arg(rig.path("ecdsa")).env("SSH_AUTH_SOCK", &socket);
    assert!(done(&mut add).await.status.success());
    let mut command = rig.ssh();
    command
        .arg("-A")
        .arg("ssh-add -L; stat -c %a $SSH_AUTH_SOCK $(dirname $SSH_AUTH_SOCK); echo $SSH_AUTH_SOCK")
        .env("SSH_AUTH_SOCK", &socket);
    let output = done(&mut command).await;
    let out = text(&output.stdout);
    let public = std::fs::read_to_string(rig.path("ecdsa.pub")).unwrap();
    assert!(out.starts_with(&format!("{public}600\n700\n")), "{output:?}");
    let path = std::path::PathBuf::from(out.lines().next_back().unwrap());
    assert_ne!(path, socket);
    until(|| !path.parent().unwrap().exists()).await;
    // Nobody gets one who did not ask.
    assert_eq!(rig.run("echo -$SSH_AUTH_SOCK-").await.1, "--\n");
}
