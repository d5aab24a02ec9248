//! What a name may be is decided by one rule for each kind of name, wherever the name is given.

use offshoot_e2e::{Daemon, IMAGE, encoded, stored, tar_of, text};

/// No name of anything.
fn bad_names() -> Vec<String> {
    let mut bad: Vec<_> = [
        "../x",
        "..",
        "a/../b",
        "a b",
        "a\nb",
        "a\tb",
        "\u{1b}[2J",
        "-x",
        "x-",
        "é",
        "a_b",
        "a?b#c",
        "%2e%2e",
    ]
    .map(String::from)
    .into();
    bad.push("a".repeat(300));
    bad
}

/// Those that an image cannot have as its name, either.
fn bad_references() -> Vec<String> {
    let mut bad = bad_names();
    bad.retain(|name| !["x-", "a_b"].contains(&name.as_str()));
    bad.push("x-".into());
    bad.push("UPPER".into());
    bad
}

/// The command fails with one error and a hint, in a single line each, whatever the name holds.
fn refused(daemon: &Daemon, arguments: &[&str], what: &str) {
    let output = daemon.cli(arguments).run();
    let error = text(&output.stderr);
    // A leading dash is an option that does not exist, for clap.
    let dash = arguments.iter().any(|argument| argument.starts_with("-x"));
    let statuses: &[i32] = if dash { &[1, 2] } else { &[1] };
    let status = output.status.code().unwrap_or(-1);
    assert!(statuses.contains(&status), "{arguments:?}: {status} {error}");
    if status == 2 {
        return;
    }
    assert!(error.starts_with("error: "), "{arguments:?}: {error}");
    assert!(
        error.contains(what),
        "{arguments:?} does not say {what:?}: {error}"
    );
    assert!(error.contains("\nhint: "), "{arguments:?} gives no hint: {error}");
    let odd = error.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(odd, None, "{arguments:?}: {error:?}");
    assert!(error.len() < 2000, "{arguments:?} says too much: {error}");
}

#[test]
fn one_rule_for_names_of_vms() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "good", IMAGE, "true"]);
    let before = stored(&daemon);
    let what = "is not a VM name";
    for bad in bad_names() {
        refused(
            &daemon,
            &["create", &format!("--name={bad}"), IMAGE, "true"],
            what,
        );
        refused(&daemon, &["run", &format!("--name={bad}"), IMAGE, "true"], what);
        refused(&daemon, &["rename", "good", &bad], what);
        for verb in [
            "start", "stop", "restart", "kill", "pause", "resume", "reset", "rm", "inspect", "logs",
            "attach", "wait",
        ] {
            refused(&daemon, &[verb, &bad], what);
        }
        refused(&daemon, &["exec", &bad, "true"], what);
        refused(&daemon, &["rename", &bad, "other"], what);
        // With a slash or a dot in front, it is a path of this machine.
        if !bad.contains('/') && !bad.starts_with('.') {
            refused(&daemon, &["cp", &format!("{bad}:/etc/passwd"), "-"], what);
            refused(&daemon, &["cp", "/etc/passwd", &format!("{bad}:/tmp")], what);
        }
    }
    assert_eq!(stored(&daemon), before, "something was made");

    // What no command line can hold, and what our own CLI would not send.
    let mut names: Vec<Vec<u8>> = bad_names().into_iter().map(String::into_bytes).collect();
    names.extend([
        b"a\0b".to_vec(),
        b"\0".to_vec(),
        b"\xff\xfe".to_vec(),
        b"a".repeat(10_000),
    ]);
    for name in &names {
        let path = format!("/v1/vms/{}", encoded(name));
        for (method, rest) in [
            ("GET", ""),
            ("DELETE", "?force=true"),
            ("POST", "/start"),
            ("POST", "/rename?name=other"),
            ("GET", "/logs"),
            ("GET", "/wait"),
            ("PUT", "/archive?path=/"),
        ] {
            let answer = daemon.request(method, &format!("{path}{rest}"), "application/json", b"");
            answer.refused(400);
        }
        let rename = format!("/v1/vms/good/rename?name={}", encoded(name));
        daemon
            .request("POST", &rename, "application/json", b"")
            .refused(400);
        if let Ok(name) = std::str::from_utf8(name) {
            let body = serde_json::json!({"image": IMAGE, "cmd": ["true"], "name": name}).to_string();
            let message = daemon
                .request("POST", "/v1/vms", "application/json", body.as_bytes())
                .refused(400);
            assert!(message.contains(what), "{message}");
        }
    }
    assert_eq!(stored(&daemon), before, "something was made");
    daemon.finish();
}

#[test]
fn one_rule_for_names_of_images_and_one_for_kernels() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let tar = folder.path().join("small.tar");
    tar_of(&tar, |dir| std::fs::create_dir_all(dir.join("bin")).unwrap());
    let tar = tar.to_str().unwrap();
    let before = stored(&daemon);
    let what = "is not an image reference";
    for bad in bad_references() {
        refused(&daemon, &["image", "import", &format!("--name={bad}"), tar], what);
        refused(
            &daemon,
            &["image", "bootstrap", &format!("--name={bad}"), "debian:bookworm"],
            what,
        );
        refused(&daemon, &["image", "pull", &bad], what);
        for verb in ["inspect", "rm", "prepare", "verify"] {
            refused(&daemon, &["image", verb, &bad], what);
        }
        refused(&daemon, &["run", "--pull", "never", &bad, "true"], what);
        for (method, path) in [
            ("GET", "/v1/images?reference="),
            ("DELETE", "/v1/images?reference="),
            ("GET", "/v1/images/inspect?reference="),
            ("POST", "/v1/images/prepare?reference="),
            ("POST", "/v1/images/verify?reference="),
            ("POST", "/v1/images/import?name="),
        ] {
            let answer = daemon.request(
                method,
                &format!("{path}{}", encoded(&bad)),
                "application/json",
                b"",
            );
            answer.refused(400);
        }
    }
    let what = "is not an id of 16 lower-case hex digits";
    for bad in bad_names() {
        refused(&daemon, &["kernel", "rm", &bad], what);
        refused(&daemon, &["kernel", "default", &bad], what);
        let path = format!("/v1/kernels/{}", encoded(&bad));
        daemon
            .request("DELETE", &path, "application/json", b"")
            .refused(400);
    }
    assert_eq!(stored(&daemon), before, "something was made");
    daemon.finish();
}
