//! Bootstraps: what is planned, what is refused, what a failure leaves.

use std::io::Write;
use std::sync::{Arc, Mutex};

use offshoot_model::ProgressEvent;

use super::*;
use crate::manifest::{Compression, StoredImage};
use crate::testing::{TestStore, skip_without};

/// A mirror on this machine that has nothing: the failure is quick and the same everywhere.
fn empty_mirror() -> BootstrapOptions {
    BootstrapOptions {
        suite: "debian:bookworm".into(),
        mirror: Some("http://127.0.0.1:1/debian".into()),
        ..BootstrapOptions::default()
    }
}

fn only_folders(store: &TestStore) {
    assert_eq!(store.files(), Vec::<std::path::PathBuf>::new());
    assert_eq!(std::fs::read_dir(store.blobs.tmp_dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn impossible_requests_are_refused_before_anything_runs() {
    let store = TestStore::new();
    for (suite, include) in [
        ("ubuntu:noble", ""),
        ("debian:--x", ""),
        ("debian:sid", "--x"),
        ("debian:sid", "a;b"),
    ] {
        let include = if include.is_empty() {
            Vec::new()
        } else {
            vec![include.to_owned()]
        };
        let options = BootstrapOptions {
            suite: suite.into(),
            include,
            ..BootstrapOptions::default()
        };
        let error = bootstrap(&store.blobs, &options, &Progress::silent())
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.hints().len()),
            (ErrorKind::InvalidRequest, 1),
            "{error}"
        );
    }
    only_folders(&store);
}

#[tokio::test]
async fn a_failure_shows_the_last_lines_and_leaves_nothing() {
    if skip_without("mmdebstrap") {
        return;
    }
    let store = TestStore::new();
    let said = Arc::new(Mutex::new(Vec::new()));
    let sink = said.clone();
    let progress = Progress::new(move |event| {
        if let ProgressEvent::Message { text } = event {
            sink.lock().unwrap().push(text);
        }
    });
    let error = bootstrap(&store.blobs, &empty_mirror(), &progress)
        .await
        .unwrap_err();
    let BootstrapError::Failed { suite, tail, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(suite, "bookworm");
    assert!(tail.iter().any(|line| line.contains("127.0.0.1")), "{tail:?}");
    assert!(
        said.lock()
            .unwrap()
            .iter()
            .any(|line| line.starts_with("mmdebstrap: "))
    );
    only_folders(&store);
}

/// The mirror takes the connection and never answers, so mmdebstrap waits; then the future is dropped.
#[tokio::test]
async fn dropping_it_kills_every_child_and_leaves_nothing() {
    if skip_without("mmdebstrap") {
        return;
    }
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let options = BootstrapOptions {
        mirror: Some(format!("http://127.0.0.1:{port}/debian")),
        ..empty_mirror()
    };
    let store = TestStore::new();
    // Every child has the staging folder in its environment or arguments.
    let marker = store.dir.path().display().to_string();
    let alive = || {
        let mentions = |file: std::path::PathBuf| {
            String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).contains(&marker)
        };
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|p| mentions(p.path().join("environ")) || mentions(p.path().join("cmdline")))
            .count()
    };
    {
        let progress = Progress::silent();
        let running = bootstrap(&store.blobs, &options, &progress);
        tokio::pin!(running);
        let _connection = tokio::select! {
            result = &mut running => panic!("{result:?}"),
            connection = silent.accept() => connection.unwrap(),
        };
        assert!(alive() >= 2, "unshare and mmdebstrap run");
    }
    // The kernel needs a moment to end them.
    let patience = std::time::Duration::from_secs(20);
    let ended = tokio::time::timeout(patience, async {
        while alive() > 0 || std::fs::read_dir(store.blobs.tmp_dir()).unwrap().count() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
    ended.await.unwrap();
    only_folders(&store);
}

/// Takes half a minute and a mirror, so it runs where it is asked for: `cargo test -p offshoot-image -- --ignored`.
#[tokio::test]
#[ignore = "downloads a Debian system"]
async fn a_debian_becomes_an_image_like_dockers() {
    let store = TestStore::new();
    let options = BootstrapOptions {
        suite: "debian:bookworm".into(),
        ..BootstrapOptions::default()
    };
    let started = std::time::Instant::now();
    let digest = bootstrap(&store.blobs, &options, &Progress::silent())
        .await
        .unwrap();
    let image = StoredImage::load(&store.blobs, &digest).unwrap();
    let layer = &image.layers[0];
    writeln!(
        std::io::stderr(),
        "{:.1} s, {} bytes",
        started.elapsed().as_secs_f64(),
        layer.size
    )
    .unwrap();
    assert_eq!(image.config.cmd, ["bash"]);
    assert_eq!(layer.compression, Compression::None);
    let mut names = std::collections::BTreeSet::new();
    let mut archive = tar::Archive::new(store.blobs.open_blob(&layer.digest).unwrap());
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let path = entry
            .path()
            .unwrap()
            .to_string_lossy()
            .trim_start_matches("./")
            .trim_end_matches('/')
            .to_owned();
        assert!(
            entry.header().mtime().unwrap() <= midnight(),
            "{path} is of today"
        );
        if path == "etc/machine-id" {
            assert_eq!(entry.size(), 0);
        }
        names.insert(path);
    }
    for there in [
        "usr/bin/apt-get",
        "usr/bin/bash",
        "usr/share/zoneinfo/Europe/Berlin",
        "etc/apt/sources.list",
    ] {
        assert!(names.contains(there), "{there}");
    }
    let rest = names.iter().filter(|name| {
        ["etc/resolv.conf", "etc/hostname"].contains(&name.as_str())
            || name.starts_with("var/lib/apt/lists/") && !name.ends_with("lock") && !name.ends_with("partial")
            || name.starts_with("var/cache/apt/") && name.ends_with("bin")
            || name.ends_with(".deb")
    });
    assert_eq!(rest.collect::<Vec<_>>(), Vec::<&String>::new());
    if let Some(path) = std::env::var_os("OFFSHOOT_KEEP_TAR") {
        std::fs::copy(store.blobs.path(&layer.digest), path).unwrap();
    }
}
