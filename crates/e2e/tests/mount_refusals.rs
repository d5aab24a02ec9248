//! Shared folders and roots that cannot be: refused before anything is made.

use std::path::Path;

use offshoot_e2e::{Daemon, IMAGE, refused, refused_by_the_api};
use serde_json::{Value, json};

/// The body of `POST /v1/vms` for a VM with these mounts.
fn request(mounts: &[(&Path, &str)]) -> Value {
    let mounts: Vec<Value> = mounts
        .iter()
        .map(|(source, target)| json!({ "source": source, "target": target, "read_only": false }))
        .collect();
    json!({ "image": IMAGE, "cmd": ["true"], "mounts": mounts })
}

#[test]
fn mounts_that_cannot_be() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let missing = dir.path().join("missing");
    let run = |volumes: &[String], what: &str| {
        let mut words = vec!["run", "--rm"];
        words.extend(volumes.iter().flat_map(|volume| ["-v", volume.as_str()]));
        words.extend([IMAGE, "true"]);
        refused(&daemon, &words, what)
    };
    let to = |source: &Path, target: &str| format!("{}:{target}", source.display());
    for source in [&missing, &file] {
        run(&[to(source, "/a")], &source.display().to_string());
        // One that is in order helps the other nothing.
        run(
            &[to(&folder, "/b"), to(source, "/a")],
            &source.display().to_string(),
        );
    }
    for again in ["/a", "/a/", "/a//", "/a/.", "//a", "/./a:ro"] {
        run(&[to(&folder, "/a"), to(&folder, again)], "/a");
    }

    // What our CLI does not even send.
    let api =
        |mounts: &[(&Path, &str)], what: &str| refused_by_the_api(&daemon, "/v1/vms", &request(mounts), what);
    for source in ["relative", "./relative", "../relative"] {
        api(&[(Path::new(source), "/a")], "relative");
    }
    api(&[(Path::new(""), "/a")], "");
    for (target, what) in [
        ("/", "/"),
        ("//", "/"),
        ("/.", "/"),
        ("relative", "relative"),
        ("./relative", "relative"),
        ("/a/../b", "/a/../b"),
        ("/..", "/.."),
        ("/proc/x", "/proc/x"),
        ("/sys", "/sys"),
        ("/dev/../x", "/dev/../x"),
        ("", ""),
    ] {
        api(&[(&folder, target)], what);
    }
    for again in ["/a", "/a/", "/a//", "/a/.", "//a", "/./a"] {
        api(&[(&folder, "/a"), (&folder, again)], "/a");
    }
    api(&[(&missing, "/a")], "missing");
    api(&[(&file, "/a")], "file");
    // And what it refuses itself is wrong usage.
    for volume in [
        "relative:/a",
        "/tmp:relative",
        "/tmp:/",
        "/tmp:/a/../b",
        "/tmp",
        "/tmp:/a:rx",
    ] {
        let error = daemon.cli(["run", "--rm", "-v", volume, IMAGE, "true"]).fails(2);
        assert!(error.starts_with("error: "), "{volume}: {error}");
    }
    assert_eq!(daemon.ok(["ps", "-aq"]), "");
    daemon.finish();
}

#[test]
fn a_host_without_virtiofsd() {
    let daemon = Daemon::start_with("virtiofsd = \"/no/such/virtiofsd\"");
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/a", dir.path().display());
    for words in [
        &["run", "--rm", "--root", "virtiofs", IMAGE, "true"][..],
        &["run", "--rm", "-v", &volume, IMAGE, "true"],
        &["create", "--root", "block", "-v", &volume, IMAGE, "true"],
    ] {
        let error = refused(&daemon, words, "/no/such/virtiofsd");
        let hints: Vec<_> = error.lines().filter(|line| line.starts_with("hint: ")).collect();
        assert!(
            hints
                .iter()
                .any(|hint| hint.contains("install") || hint.contains("virtiofsd =")),
            "{words:?} does not say how to get it: {error}"
        );
    }
    // `doctor` knows it too, and everything else works.
    let report = daemon.cli(["doctor", "--output", "json"]).run();
    let report = offshoot_e2e::text(&report.stdout);
    assert!(report.contains("/no/such/virtiofsd"), "{report}");
    assert_eq!(daemon.ok(["run", "--rm", IMAGE, "echo", "works"]), "works");
    daemon.finish();
}

#[test]
fn a_host_without_qemu() {
    let daemon = Daemon::start_with("qemu = \"/no/such/qemu\"");
    for root in ["auto", "pmem", "block", "virtiofs", "copy"] {
        refused(
            &daemon,
            &["run", "--rm", "--root", root, IMAGE, "true"],
            "/no/such/qemu",
        );
    }
    daemon.finish();
}
