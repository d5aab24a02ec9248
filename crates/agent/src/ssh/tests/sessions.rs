//! Shells and commands.

use std::fs::File;
use std::process::Stdio;

use super::{PATIENCE, Rig, done, text, until};

#[tokio::test]
async fn commands_have_streams_statuses_and_an_environment() {
    let Some(rig) = Rig::new().await else { return };
    assert_eq!(
        rig.run("echo out; echo err >&2; exit 7").await,
        (7, "out\n".into(), "err\n".into())
    );
    // OpenSSH's word for a signal.
    assert_eq!(rig.run("kill -9 $$").await.0, 255);
    let (_, out, _) = rig
        .run("whoami; pwd; echo $OF_THE_VM $USER $HOME; echo $SSH_CONNECTION")
        .await;
    let lines: Vec<&str> = out.lines().collect();
    let home = std::fs::read_to_string("/etc/passwd").unwrap();
    let home = home.lines().next().unwrap().split(':').nth(5).unwrap();
    assert_eq!(lines[..3], ["root", home, &format!("yes root {home}")]);
    assert!(lines[3].starts_with("127.0.0.1 ") && lines[3].ends_with(&format!(" 127.0.0.1 {}", rig.port)));
    let mut command = rig.ssh();
    command.args(["-o", "SetEnv=LC_X=set EVIL=no", "echo $LC_X-$EVIL-$SSH_TTY"]);
    assert_eq!(text(&done(&mut command).await.stdout), "set--\n");
    // The image's own words for somebody who has no shell.
    let mut nobody = rig.client("ssh", "ed25519");
    let output = done(nobody.args(["nobody@127.0.0.1", "true"])).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[tokio::test]
async fn a_terminal_has_a_name_modes_and_a_size() {
    let Some(rig) = Rig::new().await else { return };
    let mut command = rig.ssh();
    command
        .args(["-tt", "tty; echo $SSH_TTY $TERM; echo err >&2"])
        .env("TERM", "vt220");
    let output = done(&mut command).await;
    let out = text(&output.stdout);
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{output:?}");
    assert_eq!(lines[1..], [&*format!("{} vt220", lines[0]), "err"], "{output:?}");
    // A client with a terminal of its own.
    let inner = format!(
        "{:?}",
        rig.ssh()
            .arg("-tt")
            .arg("stty size; stty -a | grep -c ' -echo '; exit 3")
            .as_std()
    );
    let script = format!("stty rows 33 cols 44 -echo; env -u SSH_AUTH_SOCK {inner}");
    let script = script.replace(
        "env -u SSH_AUTH_SOCK env -u SSH_AUTH_SOCK",
        "env -u SSH_AUTH_SOCK",
    );
    let mut command = tokio::process::Command::new("script");
    command.args(["-qec", &script, "/dev/null"]).env("TERM", "xterm");
    let output = done(&mut command).await;
    let out = text(&output.stdout);
    assert!(out.starts_with("33 44\r\n1\r\n"), "{output:?}");
    assert_eq!(output.status.code(), Some(3));
    // Without a command: a login shell, which is fed and left.
    let mut shell = rig.ssh();
    shell
        .arg("-T")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut shell = shell.spawn().unwrap();
    let mut stdin = shell.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"echo $0; exit 4\n")
        .await
        .unwrap();
    drop(stdin);
    let output = shell.wait_with_output().await.unwrap();
    assert_eq!(
        (output.status.code(), &*text(&output.stdout)),
        (Some(4), "-bash\n")
    );
}

/// A file that is no multiple of anything.
fn large(rig: &Rig, bytes: usize) -> std::path::PathBuf {
    let path = rig.path("large");
    let content: Vec<u8> = (0..bytes.div_ceil(4))
        .flat_map(|n| (n as u32).wrapping_mul(2_654_435_761).to_le_bytes())
        .take(bytes)
        .collect();
    std::fs::write(&path, content).unwrap();
    path
}

#[tokio::test]
async fn a_hundred_megabytes_arrive_whole_both_ways_at_once() {
    let Some(rig) = Rig::new().await else { return };
    let (there, back) = (large(&rig, 100_000_007), rig.path("back"));
    let mut command = rig.ssh();
    let child = command
        .arg("cat")
        .stdin(File::open(&there).unwrap())
        .stdout(File::create(&back).unwrap())
        .spawn();
    let status = tokio::time::timeout(PATIENCE, child.unwrap().wait()).await;
    assert!(status.expect("stuck").unwrap().success());
    assert!(std::fs::read(there).unwrap() == std::fs::read(back).unwrap());
}

#[tokio::test]
async fn who_does_not_read_gets_everything_later() {
    let Some(rig) = Rig::new().await else { return };
    let there = large(&rig, 8_000_003);
    let go = rig.path("go");
    let mut command = rig.ssh();
    let script = format!("until [ -e {0} ]; do sleep 0.1; done; wc -c", go.display());
    let child = command
        .arg(script)
        .stdin(File::open(&there).unwrap())
        .stdout(Stdio::piped())
        .spawn();
    let child = child.unwrap();
    // Meanwhile others work.
    for _ in 0..5 {
        assert_eq!(rig.run("echo x").await.1, "x\n");
    }
    File::create(go).unwrap();
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    assert_eq!(text(&output.expect("stuck").unwrap().stdout), "8000003\n");
}

#[tokio::test]
async fn who_hangs_up_ends_what_talks_to_them() {
    let Some(rig) = Rig::new().await else { return };
    let alive = |pid: &str| std::path::Path::new("/proc").join(pid.trim()).exists();
    for (tty, script) in [("-tt", "sleep 1000"), ("-T", "yes")] {
        let pid_file = rig.path(&format!("pid{tty}"));
        let mut command = rig.ssh();
        command
            .arg(tty)
            .arg(format!(
                "echo $$ > {0}.new; mv {0}.new {0}; exec {script}",
                pid_file.display()
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        until(|| pid_file.exists()).await;
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        assert!(alive(&pid));
        child.kill().await.unwrap();
        until(|| !alive(&pid)).await;
    }
}

#[tokio::test]
async fn eight_at_once_and_they_are_counted() {
    let Some(rig) = Rig::new().await else { return };
    let mut watch = rig.count.watch();
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut command = rig.ssh();
        command
            .arg("read x; echo $x")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        clients.push(command.spawn().unwrap());
    }
    let eight = watch.wait_for(|count| count.ssh == 8);
    drop(
        tokio::time::timeout(PATIENCE, eight)
            .await
            .expect("never eight")
            .unwrap(),
    );
    for (number, mut client) in clients.into_iter().enumerate() {
        let mut stdin = client.stdin.take().unwrap();
        let line = format!("{number}\n");
        tokio::io::AsyncWriteExt::write_all(&mut stdin, line.as_bytes())
            .await
            .unwrap();
        let output = client.wait_with_output().await.unwrap();
        assert_eq!(text(&output.stdout), line);
    }
    let none = watch.wait_for(|count| count.ssh == 0);
    tokio::time::timeout(PATIENCE, none)
        .await
        .expect("never none")
        .unwrap();
}

#[tokio::test]
async fn the_end_of_the_vm_ends_connections() {
    let Some(rig) = Rig::new().await else { return };
    let mut watch = rig.count.watch();
    let mut command = rig.ssh();
    let mut child = command.arg("-N").stderr(Stdio::piped()).spawn().unwrap();
    watch.wait_for(|count| count.ssh == 1).await.unwrap();
    rig.server.close().await;
    let status = tokio::time::timeout(PATIENCE, child.wait()).await;
    assert_eq!(status.expect("still there").unwrap().code(), Some(255));
    assert_eq!(rig.run("true").await.0, 255);
}
