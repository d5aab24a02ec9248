//! `ssh` and what belongs to it, against a daemon and an OpenSSH with chosen answers.

use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::protocol::Message;

use crate::fake::{Fake, answer, not_found, text, tunnel};

fn hosts(state: &str, key: Option<&str>) -> Value {
    json!({"domain": "vm.internal", "vms": [{"id": "abababababab", "name": "web", "domain_name": "web.vm.internal",
        "state": state, "ipv4": null, "ipv6": null, "port": null, "host_key": key}]})
}

fn daemon(state: &'static str, key: Option<&'static str>) -> Fake {
    Fake::start(move |line, _| match line {
        "GET /v1/ssh?vm=web" | "GET /v1/ssh" => answer(200, &hosts(state, key)),
        _ => not_found("no such VM"),
    })
}

#[test]
fn ssh_becomes_the_user_s_openssh_and_ends_with_its_status() {
    let fake = daemon("running", Some("ssh-ed25519 AAAA"));
    std::fs::create_dir_all(fake.path("bin")).unwrap();
    let program = fake.path("bin/ssh");
    std::fs::write(&program, "#!/bin/sh\nfor word; do echo \"$word\"; done\nexit 7\n").unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let run = |path: &str, words: &[&str]| fake.offshoot(words).env("PATH", path).output().unwrap();

    let bin = fake.path("bin").display().to_string();
    let output = run(&format!("{bin}:/bin"), &["ssh", "-A", "me@web", "ls", "-l"]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(
        said.ends_with("-l\nme\n-A\n--\nweb.vm.internal\nls\n-l\n"),
        "{said}"
    );
    assert!(
        said.contains("KnownHostsCommand=/bin/echo web.vm.internal ssh-ed25519 AAAA\n"),
        "{said}"
    );
    assert!(said.contains(" ssh-proxy abababababab\n"), "{said}");
    let key = fake.path("home/.config/offshoot/id_ed25519");
    assert!(said.contains(key.to_str().unwrap()), "{said}");
    assert_eq!(
        std::fs::metadata(key).unwrap().permissions().mode() & 0o7777,
        0o600
    );

    let output = run(fake.path("home").to_str().unwrap(), &["ssh", "web"]);
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(text(&output.stderr), @r"
    error: cannot run OpenSSH's client, `ssh`
      caused by: No such file or directory (os error 2)
    hint: install it: `apt-get install openssh-client`
    hint: `offshoot exec -it web sh` needs none
    ");
}

#[test]
fn a_vm_that_does_not_run_has_nobody_to_talk_to() {
    let fake = daemon("stopped", None);
    let output = fake.run(&["ssh", "web"]);
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(text(&output.stderr), @r"
    error: VM `web` does not run: it is stopped
    hint: `offshoot start web`
    ");
    let output = fake.run(&["ssh-known-hosts", "web.vm.internal"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no SSH host key yet"));
    assert_eq!(fake.run(&["ssh", "other"]).status.code(), Some(1));
}

#[test]
fn known_hosts_are_told_by_the_name_that_was_asked_for() {
    let fake = daemon("running", Some("ssh-ed25519 AAAA"));
    for name in ["web", "web.vm.internal", "[web.vm.internal]:2222"] {
        let output = fake.run(&["ssh-known-hosts", name]);
        assert_eq!(text(&output.stdout), format!("{name} ssh-ed25519 AAAA\n"));
    }
    let config = fake.run(&["ssh-config"]);
    assert!(text(&config.stdout).contains("\nHost web web.vm.internal\n"));
    assert!(text(&config.stdout).contains("\nHost *.vm.internal\n"));
}

#[test]
fn the_proxy_passes_bytes_and_brings_our_key() {
    let fake = Fake::start(|line, request| {
        if !line.starts_with("GET /v1/vms/web/ssh?key=ssh-ed25519%20AAAA") {
            return not_found("no such VM");
        }
        tunnel(request, |mut socket| async move {
            socket.send(Message::binary(&b"SSH-2.0-x\r\n"[..])).await.unwrap();
            let mut heard = 0;
            while heard < 200_000 {
                match socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => heard += bytes.len(),
                    _ => return,
                }
            }
            socket.send(Message::binary(vec![7; 60_000])).await.unwrap();
            socket.close(None).await.unwrap();
        })
    });
    let mut proxy = fake.offshoot(&["ssh-proxy", "web.vm.internal"]);
    let mut child = proxy
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Open to the end, as ssh has it: the daemon's end is the proxy's.
    let mut input = child.stdin.take().unwrap();
    input.write_all(&vec![1; 200_000]).unwrap();
    let mut output = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(output.len(), 11 + 60_000);
    assert!(output.starts_with(b"SSH-2.0-x\r\n"));

    // When ssh is gone, so is the proxy.
    let mut proxy = fake.offshoot(&["ssh-proxy", "web"]);
    let child = proxy.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
    assert!(child.success());
}
