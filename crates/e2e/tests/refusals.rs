//! Bad input: one clear error with a hint, the promised status, and nothing half-made.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use offshoot_e2e::{Daemon, IMAGE, bin_dir, refused, tar_of, text};

#[test]
fn requests_that_make_no_sense() {
    let daemon = Daemon::start();
    refused(
        &daemon,
        &["run", "--pull", "never", "no-such-image", "true"],
        "no such image",
    );
    refused(&daemon, &["run", "UPPER", "true"], "image reference");
    refused(&daemon, &["run", "--memory", "0", IMAGE, "true"], "memory");
    refused(&daemon, &["run", "--cpus", "0", IMAGE, "true"], "vcpus");
    refused(
        &daemon,
        &["run", "--vmm", "firecracker", IMAGE, "true"],
        "firecracker",
    );
    refused(&daemon, &["exec", "nobody", "true"], "no such vm");
    refused(&daemon, &["rm", "nobody"], "no such vm");
    refused(&daemon, &["image", "rm", "nothing:1"], "no such image");
    refused(
        &daemon,
        &["image", "bootstrap", "debian:no-such-suite"],
        "no-such-suite",
    );
    daemon.ok(["create", "--name", "taken", IMAGE, "true"]);
    refused(&daemon, &["create", "--name", "taken", IMAGE, "true"], "taken");
    refused(&daemon, &["create", "--name", "TAKEN", IMAGE, "true"], "taken");
    refused(&daemon, &["exec", "taken", "true"], "created");
    for bad in ["../x", "a_b", "-x-", "x\n", &"a".repeat(300)] {
        let status = daemon
            .cli(["create", &format!("--name={bad}"), IMAGE, "true"])
            .run()
            .status
            .code();
        assert!(matches!(status, Some(1 | 2)), "{bad:?} was taken: {status:?}");
    }
    daemon.cli(["run"]).fails(2);
    daemon.cli(["no-such-command"]).fails(2);
    daemon.cli(["run", "--no-such-flag", IMAGE]).fails(2);
    daemon.finish();
}

#[test]
fn no_kernel_yet() {
    let daemon = Daemon::start_empty();
    let dir = tempfile::tempdir().unwrap();
    let tar = dir.path().join("small.tar");
    tar_of(&tar, |dir| std::fs::create_dir_all(dir.join("bin")).unwrap());
    daemon.ok(["image", "import", "--name", "small", tar.to_str().unwrap()]);
    refused(&daemon, &["run", "small", "/bin/true"], "kernel");
    daemon.finish();
}

#[test]
fn no_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(bin_dir().join("offshoot"))
        .arg("ps")
        .env("OFFSHOOT_SOCKET", dir.path().join("api.sock"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let error = text(&output.stderr);
    assert!(error.contains("offshootd") && error.contains("hint: "), "{error}");
}

/// Writes a tar with one entry of any name, as no tar program would.
fn hostile_tar(tar: &Path, entries: &[(&str, Option<&str>)]) {
    let mut file = std::fs::File::create(tar).unwrap();
    let mut entry = |name: &str, link: Option<&str>| {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(b"00000000000\0");
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = if link.is_some() { b'2' } else { b'0' };
        if let Some(link) = link {
            header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        file.write_all(&header).unwrap();
    };
    entry("etc/passwd", None);
    for (name, link) in entries {
        entry(name, *link);
    }
    file.write_all(&[0; 1024]).unwrap();
}

#[test]
fn archives_that_are_broken_or_hostile() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let import = |file: &str, what: &str| refused(&daemon, &["image", "import", "--name", "bad", file], what);

    std::fs::write(path("rubbish"), b"this is no archive at all".repeat(100)).unwrap();
    import(&path("rubbish"), "archive");
    std::fs::write(path("empty"), b"").unwrap();
    import(&path("empty"), "");
    tar_of(Path::new(&path("whole.tar")), |dir| {
        std::fs::create_dir_all(dir.join("usr/bin")).unwrap();
        std::fs::write(dir.join("usr/bin/x"), vec![7; 200_000]).unwrap();
    });
    let whole = std::fs::read(path("whole.tar")).unwrap();
    std::fs::write(path("cut.tar"), &whole[..100_000]).unwrap();
    import(&path("cut.tar"), "");
    import(&path("not-there.tar"), "not-there.tar");

    for (name, entries, what) in [
        ("up.tar", &[("usr/../../escape", None)][..], "escape"),
        (
            "absolute.tar",
            &[("/tmp/offshoot-escape", None)][..],
            "/tmp/offshoot-escape",
        ),
        (
            "link.tar",
            &[("way", Some("../../../../tmp")), ("way/offshoot-escape", None)][..],
            "way",
        ),
        (
            "link2.tar",
            &[("way", Some("/tmp")), ("way/offshoot-escape", None)][..],
            "way",
        ),
    ] {
        hostile_tar(Path::new(&path(name)), entries);
        import(&path(name), what);
    }
    assert!(!Path::new("/tmp/offshoot-escape").exists());

    // A layer whose bytes are not those that its digest promises.
    let layout = dir.path().join("layout");
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let zeros = "0".repeat(64);
    std::fs::write(blobs.join(&zeros), "{}").unwrap();
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{zeros}","size":2}}]}}"#
    );
    std::fs::write(layout.join("index.json"), index).unwrap();
    import(layout.to_str().unwrap(), "digest");
    daemon.finish();
}

#[test]
fn a_layer_that_would_fill_the_disk() {
    // The data directory is a small file system of its own, so that no real disk is filled.
    let daemon = Daemon::start_on_small_disk(192);
    let dir = tempfile::tempdir().unwrap();
    let tar = dir.path().join("big.tar");
    tar_of(&tar, |dir| {
        std::fs::create_dir_all(dir.join("usr")).unwrap();
        let mut file = std::fs::File::create(dir.join("usr/big")).unwrap();
        let block: Vec<u8> = (0..1u32 << 20)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        for _ in 0..150 {
            file.write_all(&block).unwrap();
        }
    });
    refused(
        &daemon,
        &["image", "import", "--name", "big", tar.to_str().unwrap()],
        "kept free",
    );
    daemon.finish();
}
