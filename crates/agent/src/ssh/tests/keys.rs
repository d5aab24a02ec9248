//! Who gets in, and what everybody else can do.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::super::config::parse_keys;
use super::super::connection::{Peer, serve};
use super::{PATIENCE, Rig, done, text};

#[tokio::test]
async fn keys_of_every_kind_let_in_and_nothing_else_does() {
    let Some(rig) = Rig::new().await else { return };
    for key in ["ed25519", "ecdsa", "rsa"] {
        let output = done(rig.client("ssh", key).args(["root@127.0.0.1", "echo in"])).await;
        assert_eq!(text(&output.stdout), "in\n", "{key}: {output:?}");
    }
    let refused = |output: std::process::Output| {
        assert_eq!(output.status.code(), Some(255), "{output:?}");
        let text = text(&output.stderr);
        // The one way in is what the client is told.
        assert!(text.contains("Permission denied (publickey)."), "{text}");
    };
    let mut wrong = rig.client("ssh", "wrong");
    refused(done(wrong.args(["root@127.0.0.1", "true"])).await);
    let mut unknown = rig.client("ssh", "ed25519");
    refused(done(unknown.args(["no-such-user@127.0.0.1", "true"])).await);
    let mut old = rig.client("ssh", "rsa");
    old.args(["-o", "PubkeyAcceptedAlgorithms=ssh-rsa", "root@127.0.0.1", "true"]);
    refused(done(&mut old).await);
    let mut password = rig.client("ssh", "wrong");
    password.args(["-o", "PreferredAuthentications=password,keyboard-interactive"]);
    refused(done(password.args(["root@127.0.0.1", "true"])).await);
}

#[tokio::test]
async fn a_key_of_a_connection_is_good_there_alone() {
    let Some(rig) = Rig::new().await else { return };
    let mut other = rig.client("ssh", "other");
    assert_eq!(
        done(other.args(["root@127.0.0.1", "true"])).await.status.code(),
        Some(255)
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let keys = parse_keys(&[std::fs::read_to_string(rig.path("other.pub")).unwrap()]);
    let server = Arc::clone(&rig.server);
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(server, stream, Peer::Host, keys, None).await;
    });
    let mut other = rig.client_of("ssh", "other", port);
    let output = done(other.args(["root@127.0.0.1", "echo $SSH_CLIENT"])).await;
    assert_eq!(text(&output.stdout), "UNKNOWN 65535 65535\n", "{output:?}");
    serving.await.unwrap();
}

/// A small generator (xorshift), so that what fails once fails again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[tokio::test]
async fn two_thousand_clients_that_speak_nonsense_do_no_harm() {
    let Some(rig) = Rig::new().await else { return };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..2000 {
        let mut bytes = match round % 4 {
            // Those who begin well.
            0 => b"SSH-2.0-x\r\n".to_vec(),
            1 => b"SSH-2.0-x\r\n\0\0\x01\x0c\x0a\x14".to_vec(),
            _ => Vec::new(),
        };
        for _ in 0..random.next() % 600 {
            bytes.push(random.next() as u8);
        }
        let mut stream = TcpStream::connect(("127.0.0.1", rig.port)).await.unwrap();
        // The server may have gone away in the middle of it, which is what it should do.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with(b"SSH-2.0-Offshoot"));
    }
    assert_eq!(rig.run("echo still there").await.1, "still there\n");
    let mut watch = rig.count.watch();
    let none = watch.wait_for(|count| count.ssh == 0);
    tokio::time::timeout(PATIENCE, none)
        .await
        .expect("never none")
        .unwrap();
}
