//! Commands without a session, against a daemon with chosen answers.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use crate::fake::{Fake, answer, image, lines, not_found, now, offshoot, response, text, vm};
use http_body_util::BodyExt;
use serde_json::json;

/// What a daemon was sent.
type Seen<T> = Arc<Mutex<Vec<T>>>;

#[test]
fn without_a_daemon_the_status_is_3() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    for words in [
        &["ps"][..],
        &["run", "img"],
        &["rm", "a", "b"],
        &["image", "ls"],
        &["cp", "web:/a", "."],
        &["exec", "web", "ls"],
    ] {
        let output = offshoot(&[&["--socket", socket.to_str().unwrap()], words].concat())
            .output()
            .unwrap();
        let error = text(&output.stderr).replace(socket.to_str().unwrap(), "SOCKET");
        assert_eq!(output.status.code(), Some(3), "{words:?}: {error}");
        insta::allow_duplicates! {
            insta::assert_snapshot!(error, @r#"
            error: cannot reach the daemon at `SOCKET`
              caused by: No such file or directory (os error 2)
            hint: start the daemon: `offshootd`, or name its socket with `--socket` or OFFSHOOT_SOCKET
            "#);
        }
        assert!(output.stdout.is_empty());
    }
    let output = offshoot(&["--socket", socket.to_str().unwrap(), "version"])
        .output()
        .unwrap();
    assert!(output.status.success());
}

#[test]
fn wrong_words_have_status_2() {
    for words in [
        &["run", "--no-such-flag", "img"][..],
        &["frobnicate"],
        &["stop"],
        &["run", "--boot", "warm", "img"],
    ] {
        let output = offshoot(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(text(&output.stderr).starts_with("error: "));
    }
}

#[test]
fn errors_of_the_daemon_are_printed_and_the_rest_goes_on() {
    let fake = Fake::start(|line, _| match line {
        "POST /v1/vms/good/start" => answer(200, &vm("running")),
        "POST /v1/vms/bad%2F..%2Fx/start" => answer(
            409,
            &json!({"kind": "wrong-state", "message": "cannot start VM `bad`", "causes": ["it runs already"],
                "hints": ["stop it first: `offshoot stop bad`"]}),
        ),
        "GET /v1/vms?all=false" => now(response(500, "<html>")),
        _ => not_found("no such VM"),
    });
    let output = fake.run(&["start", "bad/../x", "good"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "good\n");
    insta::assert_snapshot!(text(&output.stderr), @r#"
    error: cannot start VM `bad`
      caused by: it runs already
    hint: stop it first: `offshoot stop bad`
    "#);
    let output = fake.run(&["ps"]);
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(text(&output.stderr), @r#"
    error: cannot understand or finish the daemon's answer to `GET /v1/vms`
      caused by: HTTP status 500 without a description
    hint: compare the versions of client and daemon: `offshoot version`
    "#);
}

#[test]
fn long_work_ends_with_its_result() {
    let fake = Fake::start(|line, _| {
        let progress = [
            json!({"type": "progress", "progress": {"event": "started", "task": 1, "label": "layer", "unit": "bytes", "total": 9}}),
            json!({"type": "progress", "progress": {"event": "moved", "task": 1, "done": 5}}),
            json!({"type": "progress", "progress": {"event": "message", "text": "hello"}}),
        ];
        let failed = json!({"type": "failed", "error": {"kind": "bad-content", "message": "cannot prepare `bad`",
            "causes": ["digest mismatch"], "hints": []}});
        match line {
            "POST /v1/images/prepare?force=false&reference=good" => lines(
                &[
                    &progress[..],
                    &[json!({"type": "done", "result": image("good:latest")})],
                ]
                .concat(),
            ),
            "POST /v1/images/prepare?force=false&reference=bad" => {
                lines(&[&progress[..], &[failed]].concat())
            }
            "POST /v1/images/prepare?force=false&reference=cut" => lines(&progress),
            _ => not_found("no such image"),
        }
    });
    let output = fake.run(&["image", "prepare", "good"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(0), "good:latest\n", "")
    );
    let output = fake.run(&["image", "prepare", "good", "--output", "json"]);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap(),
        image("good:latest")
    );
    let output = fake.run(&["image", "prepare", "bad"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    assert_eq!(
        text(&output.stderr),
        "error: cannot prepare `bad`\n  caused by: digest mismatch\n"
    );
    let output = fake.run(&["image", "prepare", "cut"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the answer ended before its result"));
}

#[test]
fn an_upload_that_is_refused_early_tells_why() {
    let fake = Fake::start(|_, _| {
        answer(
            422,
            &json!({"kind": "bad-content", "message": "cannot import the archive", "causes": ["not a tar"], "hints": []}),
        )
    });
    let output = fake.run_with_input(&["image", "import", "--name", "x", "-"], &vec![7; 32 << 20]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "error: cannot import the archive\n  caused by: not a tar\n"
    );
}

#[test]
fn archives_and_folders_are_sent_whole() {
    let bodies: Seen<(Option<String>, Vec<u8>)> = Arc::default();
    let seen = Arc::clone(&bodies);
    let fake = Fake::start(move |_, request| {
        let seen = Arc::clone(&seen);
        Box::pin(async move {
            let length = request
                .headers()
                .get("content-length")
                .map(|value| value.to_str().unwrap().to_owned());
            let body = request.into_body().collect().await.unwrap().to_bytes();
            seen.lock().unwrap().push((length, body.to_vec()));
            lines(&[json!({"type": "done", "result": [image("a:1"), image("b:2")]})]).await
        })
    });
    let layout = fake.path("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    for (name, data) in [
        ("oci-layout", "{}"),
        ("index.json", "{}"),
        ("blobs/sha256/ab", "blob"),
        ("unrelated", "x"),
    ] {
        std::fs::write(layout.join(name), data).unwrap();
    }
    std::fs::write(fake.path("a.tar"), vec![9; 3 << 20]).unwrap();
    for path in ["layout", "a.tar"] {
        let output = fake.run(&["image", "import", path, "--prepare=no"]);
        assert_eq!(
            (output.status.code(), text(&output.stdout), text(&output.stderr)),
            (Some(0), "a:1\nb:2\n", "")
        );
    }
    assert_eq!(fake.requests(), ["POST /v1/images/import?prepare=false"; 2]);
    let bodies = bodies.lock().unwrap();
    let names: Vec<String> = tar::Archive::new(bodies[0].1.as_slice())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(
        names,
        [
            "oci-layout",
            "index.json",
            "blobs",
            "blobs/sha256",
            "blobs/sha256/ab"
        ]
    );
    assert_eq!(bodies[1], (Some((3 << 20).to_string()), vec![9; 3 << 20]));
}

#[test]
fn pulls_bring_the_users_credentials() {
    let bodies: Arc<Mutex<Vec<serde_json::Value>>> = Arc::default();
    let seen = Arc::clone(&bodies);
    let fake = Fake::start(move |_, request| {
        let seen = Arc::clone(&seen);
        Box::pin(async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            seen.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
            lines(&[json!({"type": "done", "result": image("x")})]).await
        })
    });
    std::fs::create_dir(fake.path("docker")).unwrap();
    std::fs::write(
        fake.path("docker/config.json"),
        r#"{"auths": {"localhost:5000": {"auth": "bWU6c2VjcmV0"}}}"#,
    )
    .unwrap();
    assert!(
        fake.run(&["image", "pull", "localhost:5000/x", "--platform", "linux/arm64"])
            .status
            .success()
    );
    assert!(
        fake.run(&["pull", "other.example/x", "--prepare=no"])
            .status
            .success()
    );
    assert_eq!(
        *bodies.lock().unwrap(),
        [
            json!({"reference": "localhost:5000/x", "platform": "linux/arm64", "prepare": true,
                "auth": {"type": "basic", "username": "me", "password": "secret"}}),
            json!({"reference": "other.example/x", "platform": null, "prepare": false, "auth": null}),
        ]
    );
    std::fs::write(fake.path("docker/config.json"), "{\"auths\": secret").unwrap();
    let output = fake.run(&["image", "pull", "localhost:5000/x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!text(&output.stderr).contains("secret"));
}

#[test]
fn logs_keep_the_two_streams_apart() {
    let fake = Fake::start(|_, _| {
        let mut frames = bytes::BytesMut::new();
        offshoot_api::log_frame::encode(offshoot_api::log_frame::LogStream::Stdout, b"out\n", &mut frames);
        offshoot_api::log_frame::encode(offshoot_api::log_frame::LogStream::Stderr, b"err\n", &mut frames);
        now(response(200, frames.freeze()))
    });
    let output = fake.run(&["logs", "-f", "-n", "5", "-t", "web"]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("out\n", "err\n"));
    assert_eq!(
        fake.requests(),
        ["GET /v1/vms/web/logs?console=false&follow=true&tail=5&timestamps=true"]
    );
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let fake = Fake::start(|_, _| {
        let mut frames = bytes::BytesMut::new();
        for _ in 0..200 {
            offshoot_api::log_frame::encode(
                offshoot_api::log_frame::LogStream::Stdout,
                &[b'y'; 60_000],
                &mut frames,
            );
        }
        now(response(200, frames.freeze()))
    });
    let mut child = fake
        .offshoot(&["logs", "web"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(141), ""));
}

#[test]
fn wait_prints_the_statuses_and_is_itself_no_failure() {
    let fake = Fake::start(|line, _| match line {
        "GET /v1/vms/a/wait" => answer(200, &json!({"exit": {"code": 7, "reason": "main-exited"}})),
        "GET /v1/vms/b/wait" => answer(200, &json!({"exit": {"code": 137, "reason": "killed"}})),
        _ => answer(200, &json!({"exit": null})),
    });
    let output = fake.run(&["wait", "a", "b"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), "7\n137\n")
    );
    assert_eq!(fake.run(&["wait", "never"]).status.code(), Some(0));
}

fn stat(name: &str, mode: u32, link: &str) -> String {
    json!({"name": name, "mode": mode, "size": 0, "link_target": link}).to_string()
}

fn archive(stat: &str, tar: Vec<u8>) -> crate::fake::Answer {
    let mut response = response(200, tar);
    response
        .headers_mut()
        .insert("x-offshoot-path-stat", stat.parse().unwrap());
    now(response)
}

fn tar_of(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
        }
        tar.append_data(&mut header, name, data.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn files_come_out_of_a_guest() {
    let fake = Fake::start(|line, _| match line {
        "GET /v1/vms/web/archive?path=%2Fetc%2Fhostname" => {
            archive(&stat("hostname", 0o100_644, ""), tar_of(&[("hostname", "web\n")]))
        }
        "GET /v1/vms/web/archive?path=%2Fsrv" => archive(
            &stat("srv", 0o040_755, ""),
            tar_of(&[("srv/", ""), ("srv/a", "A"), ("srv/sub/", ""), ("srv/sub/b", "B")]),
        ),
        "GET /v1/vms/web/archive?path=%2Fbin" => archive(&stat("bin", 0o120_777, "srv"), Vec::new()),
        "GET /v1/vms/web/archive?path=%2Fevil" => {
            archive(&stat("evil", 0o040_755, ""), tar_of(&[("passwd", "x")]))
        }
        _ => not_found("no such path"),
    });
    let read = |name: &str| std::fs::read_to_string(fake.path(name)).unwrap();
    let good = |words: &[&str]| {
        let output = fake.run(words);
        assert_eq!(
            (output.status.code(), text(&output.stderr)),
            (Some(0), ""),
            "{words:?}"
        );
        output.stdout
    };
    good(&["cp", "web:/etc/hostname", "."]);
    assert_eq!(read("hostname"), "web\n");
    good(&["cp", "web:etc/hostname", "renamed"]);
    assert_eq!(read("renamed"), "web\n");
    good(&["cp", "web:/srv", "new"]);
    assert_eq!((read("new/a"), read("new/sub/b")), ("A".into(), "B".into()));
    good(&["cp", "web:/srv", "new"]);
    assert_eq!(read("new/srv/a"), "A");
    good(&["cp", "web:/srv/.", "new"]);
    assert_eq!(read("new/sub/b"), "B");
    good(&["cp", "web:/bin/.", "through-link"]);
    assert_eq!(read("through-link/a"), "A");
    let tar = good(&["cp", "web:/etc/hostname", "-"]);
    assert_eq!(tar::Archive::new(tar.as_slice()).entries().unwrap().count(), 1);
    for (words, why) in [
        (["cp", "web:/etc/hostname", "missing/"], "does not exist"),
        (["cp", "web:/srv", "hostname"], "cannot replace a file"),
        (["cp", "web:/evil", "."], "outside of what was asked for"),
        (["cp", "web:/nothing", "."], "no such path"),
        (["cp", "web:/srv", "a/b/c"], "cannot copy to the folder"),
        (["cp", "hostname", "renamed"], "neither side"),
        (["cp", "web:/a", "db:/b"], "from one VM to another"),
    ] {
        let output = fake.run(&words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert!(
            text(&output.stderr).contains(why),
            "{words:?}: {}",
            text(&output.stderr)
        );
    }
    assert!(!fake.path("passwd").exists());
}

#[test]
fn files_go_into_a_guest() {
    let puts: Seen<(String, Vec<String>)> = Arc::default();
    let seen = Arc::clone(&puts);
    let fake = Fake::start(move |line, request| {
        let (line, seen) = (line.to_owned(), Arc::clone(&seen));
        match line.as_str() {
            "GET /v1/vms/web/archive?path=%2Fsrv" => archive(&stat("srv", 0o040_755, ""), Vec::new()),
            "GET /v1/vms/web/archive?path=%2Flink" => archive(&stat("link", 0o120_777, "srv"), Vec::new()),
            "GET /v1/vms/web/archive?path=%2Fetc%2Fmotd" => archive(&stat("motd", 0o100_644, ""), Vec::new()),
            put if put.starts_with("PUT ") => Box::pin(async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut archive = tar::Archive::new(&body[..]);
                let names = archive
                    .entries()
                    .unwrap()
                    .map(|e| e.unwrap().path().unwrap().display().to_string())
                    .collect();
                seen.lock()
                    .unwrap()
                    .push((line.split_once("path=").unwrap().1.to_owned(), names));
                answer(200, &json!({"files": 1})).await
            }),
            _ => not_found("no such path"),
        }
    });
    std::fs::create_dir_all(fake.path("dir/sub")).unwrap();
    std::fs::write(fake.path("dir/sub/b"), "B").unwrap();
    std::fs::write(fake.path("file"), "F").unwrap();
    let mut expected: Vec<(String, Vec<String>)> = Vec::new();
    for (source, destination, folder, names) in [
        ("file", "web:/srv", "%2Fsrv", &["file"][..]),
        ("file", "web:/srv/", "%2Fsrv", &["file"]),
        ("file", "web:/link", "%2Fsrv", &["file"]),
        ("file", "web:/etc/motd", "%2Fetc", &["motd"]),
        ("file", "web:/etc/new", "%2Fetc", &["new"]),
        ("dir", "web:/srv", "%2Fsrv", &["dir", "dir/sub", "dir/sub/b"]),
        ("dir/.", "web:/srv", "%2Fsrv", &["sub", "sub/b"]),
        ("dir", "web:/srv/new", "%2Fsrv", &["new", "new/sub", "new/sub/b"]),
    ] {
        let output = fake.run(&["cp", source, destination]);
        assert_eq!(
            (output.status.code(), text(&output.stderr)),
            (Some(0), ""),
            "{source} {destination}"
        );
        expected.push((folder.into(), names.iter().map(ToString::to_string).collect()));
    }
    let output = fake.run_with_input(&["cp", "-", "web:/srv"], &tar_of(&[("x", "X")]));
    assert!(output.status.success());
    expected.push(("%2Fsrv".into(), vec!["x".into()]));
    assert_eq!(*puts.lock().unwrap(), expected);
    for words in [
        ["cp", "dir", "web:/etc/motd"],
        ["cp", "file", "web:/etc/new/"],
        ["cp", "missing", "web:/srv"],
    ] {
        assert_eq!(fake.run(&words).status.code(), Some(1), "{words:?}");
    }
}

#[test]
fn completions_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let mut child = offshoot(&["completion", shell])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut script = String::new();
        child.stdout.take().unwrap().read_to_string(&mut script).unwrap();
        assert!(
            child.wait().unwrap().success() && script.contains("bootstrap"),
            "{shell}"
        );
    }
}

#[test]
fn prune_asks_before_it_deletes_and_only_people() {
    let report = json!({"removed": [{"kind": "kernel", "name": "0101010101010101", "bytes": 1048576}],
        "freed_bytes": 1048576, "kept_for_grace": [], "grace_s": 60, "failed": [], "notes": []});
    let mut failed = report.clone();
    failed["failed"] =
        json!([{"item": {"kind": "base", "name": "ab", "bytes": 1}, "reason": "permission denied"}]);
    let busy = json!({"kind": "conflict", "message": "cannot prune now: images or VMs are being made", "causes": [],
        "hints": ["try again"]});
    let fake = Fake::start(move |line, _| match line {
        "POST /v1/system/prune?all=false" => answer(200, &report),
        "POST /v1/system/prune?all=true&grace_s=90" => answer(200, &failed),
        "POST /v1/system/prune?all=true&grace_s=0" => answer(409, &busy),
        _ => not_found("nothing there"),
    });
    let output = fake.run(&["prune"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""));
    insta::assert_snapshot!(text(&output.stderr), @r"
    error: cannot ask whether to delete: standard input is not a terminal
    hint: write `offshoot prune --force`
    ");
    assert!(fake.requests().is_empty());

    let output = fake.run(&["prune", "-f"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    insta::assert_snapshot!(text(&output.stdout), @r"
    KIND     NAME               SIZE
    kernel   0101010101010101   1MiB

    Freed 1MiB
    ");
    let output = fake.run(&["prune", "-f", "--output", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["freed_bytes"], 1_048_576);

    let output = fake.run(&["prune", "-fa", "--grace", "1m 30s"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "error: cannot remove base ab: permission denied\n"
    );
    let output = fake.run(&["prune", "-fa", "--grace", "0s"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: cannot prune now"));
}

#[test]
fn damage_has_status_1_and_a_remedy() {
    let part = |state: &str| json!({"part": "base", "name": "root.erofs", "bytes": 4096, "state": state, "reason": null});
    let report = move |state: &str, hints: &[&str]| {
        let result = json!({"reference": "img:latest", "digest": format!("sha256:{}", "0a".repeat(32)),
            "parts": [part(state)], "hints": hints});
        lines(&[json!({"type": "done", "result": result})])
    };
    let fake = Fake::start(move |line, _| match line {
        "POST /v1/images/verify?reference=good" => report("ok", &[]),
        "POST /v1/images/verify?reference=new" => report("not-prepared", &[]),
        "POST /v1/images/verify?reference=bad" => report(
            "damaged",
            &["make the base again: `offshoot image prepare --force bad`"],
        ),
        _ => not_found("no such image"),
    });
    for (image, code) in [("good", 0), ("new", 0), ("bad", 1), ("none", 1)] {
        assert_eq!(
            fake.run(&["image", "verify", image]).status.code(),
            Some(code),
            "{image}"
        );
    }
    let output = fake.run(&["image", "verify", "bad"]);
    insta::assert_snapshot!(text(&output.stdout), @r"
    PART   NAME         SIZE   RESULT
    base   root.erofs   4KiB   DAMAGED
    hint: make the base again: `offshoot image prepare --force bad`
    ");
    let output = fake.run(&["image", "verify", "bad", "--output", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["parts"][0]["state"], "damaged");
}

#[test]
fn reset_goes_to_each_vm() {
    let fake = Fake::start(|line, _| match line {
        "POST /v1/vms/a/reset?force=true" | "POST /v1/vms/a/reset?force=false" => answer(200, &vm("created")),
        _ => not_found("no such VM: `b`"),
    });
    let output = fake.run(&["reset", "-f", "a", "b"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "a\n"));
    assert_eq!(fake.run(&["reset", "a"]).status.code(), Some(0));
    assert_eq!(fake.requests()[2], "POST /v1/vms/a/reset?force=false");
}

#[test]
fn df_is_the_daemons_own_json() {
    let fake = Fake::start(|line, _| {
        assert_eq!(line, "GET /v1/system/df");
        answer(200, &json!({"totals": {"disk": 4096}}))
    });
    let output = fake.run(&["df", "--output", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["totals"]["disk"], &json["templates"]),
        (&json!(4096), &json!([]))
    );
    let output = fake.run(&["df", "-v"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("Disk:    4KiB in all"));
}

#[test]
fn stats_are_shown_as_long_as_the_vm_runs() {
    let sample = |n: u64| {
        json!({"id": "abababababab", "name": "web", "state": "running", "read_at_us": n * 1_000_000,
            "started_ms": 5, "cpu": {"used_us": n * 500_000, "vcpus": 1},
            "memory": {"guest": 268_435_456, "processes": {"unique": 1_048_576}},
            "disk": {}, "network": {"received_bytes": 8192, "sent_bytes": 1024}, "pids": {"current": 6}})
    };
    let asked = Arc::new(Mutex::new(0));
    let count = Arc::clone(&asked);
    let fake = Fake::start(move |line, _| {
        let mut n = count.lock().unwrap();
        *n += 1;
        match (line, *n) {
            // The VM is there twice in each call that follows below, and then it is stopped.
            ("GET /v1/vms/web/stats", 1..=4 | 6..=7) => answer(200, &sample(*n)),
            ("GET /v1/vms/web/stats", _) => answer(
                409,
                &json!({"kind": "wrong-state", "message": "cannot tell what VM `web` takes: it is stopped",
                    "causes": [], "hints": ["start it with `offshoot start web`"]}),
            ),
            ("GET /v1/stats", _) => answer(200, &json!([])),
            _ => not_found("no such VM"),
        }
    });
    let output = fake.run(&["stats", "--no-stream", "web"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    insta::assert_snapshot!(text(&output.stdout), @r"
    NAME   ID             CPU     MEMORY / GUEST   SHARED   DISK   READ / WRITTEN   RECEIVED / SENT   PIDS
    web    abababababab   50.0%   1MiB / 256MiB    0B       0B     0B / 0B          8KiB / 1KiB       6
    ");
    let lines = fake.run(&["stats", "--output", "json", "web"]);
    assert!(lines.status.success(), "{}", text(&lines.stderr));
    let told: Vec<serde_json::Value> = text(&lines.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let times: Vec<_> = told.iter().map(|line| line[0]["read_at_us"].as_u64()).collect();
    assert_eq!(times, [Some(3_000_000), Some(4_000_000)]);
    // Not a terminal: one table after another, and no cursor is moved.
    let tables = fake.run(&["stats", "web"]);
    assert_eq!(text(&tables.stdout).matches("NAME").count(), 2);
    assert!(!text(&tables.stdout).contains('\u{1b}'));
    let gone = fake.run(&["stats", "web"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("offshoot start web"));
    let none = fake.run(&["stats", "--no-stream", "--output", "json"]);
    assert_eq!(text(&none.stdout), "[]\n");
}

#[test]
fn a_person_sees_what_would_go_and_may_say_no() {
    let fake = Fake::start(|line, _| {
        let removed = json!([{"kind": "base", "name": "abab", "bytes": 2_097_152}]);
        match line {
            "GET /v1/system/prune?all=false" | "POST /v1/system/prune?all=false" => answer(
                200,
                &json!({"removed": removed, "freed_bytes": 2_097_152, "grace_s": 3600}),
            ),
            _ => answer(
                200,
                &json!({"removed": [], "kept_for_grace": removed, "grace_s": 3600}),
            ),
        }
    });
    let ask = |words: &[&str], reply: &[u8]| {
        let (mut person, terminal) = crate::sessions::terminal();
        // Typed ahead: it lies in the terminal until it is asked for.
        person.write_all(reply).unwrap();
        let output = fake.offshoot(words).stdin(terminal).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        (text(&output.stdout).to_owned(), text(&output.stderr).to_owned())
    };
    let (stdout, stderr) = ask(&["prune"], b"n\n");
    assert_eq!(stdout, "");
    insta::assert_snapshot!(stderr, @r#"
    Nothing needs any more:

    KIND   NAME   SIZE
    base   abab   2MiB

    Delete all this? [y/N] Nothing was deleted
    "#);
    assert_eq!(fake.requests(), ["GET /v1/system/prune?all=false"]);
    let (stdout, _) = ask(&["prune"], b"y\n");
    assert!(stdout.ends_with("Freed 2MiB\n"), "{stdout}");
    assert_eq!(fake.requests()[2], "POST /v1/system/prune?all=false");
    // Where nothing goes, nothing is asked.
    let (stdout, stderr) = ask(&["prune", "--all"], b"");
    assert_eq!(stderr, "");
    insta::assert_snapshot!(stdout, @r#"
    Nothing to delete
    Kept 1 more (2MiB), made or used less than 1h ago: `--grace 0s` takes them as well
    "#);
    assert_eq!(fake.requests().len(), 4);
}
