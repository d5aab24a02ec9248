//! The inventory that every test ends with sees whatever could be left: no leak passes because a kind was overlooked.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use offshoot_e2e::{Daemon, IMAGE, comes_true, text};

/// Runs a program, which must succeed.
fn does(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout).trim().to_owned()
}

/// A hierarchy of control groups in which one can be made.
fn cgroup(name: &str) -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let places = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(place).join(name))
    });
    let made = places.into_iter().find(|path| std::fs::create_dir(path).is_ok());
    made.expect("a mounted hierarchy of control groups")
}

/// Makes one of every kind by hand: an inventory that overlooks a kind finds no leak of it.
#[test]
fn a_leftover_of_every_kind_is_named() {
    let daemon = Daemon::start();
    let before = daemon.inventory();
    let root = daemon.root();
    let at = |name: &str| root.join(name).display().to_string();
    let mark = root.file_name().unwrap().to_str().unwrap();
    let inside = |words: &[&str]| daemon.namespace().ok(words);

    let mut process = Command::new("sh")
        .args(["-c", "read word", mark])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::fs::create_dir(root.join("mounted")).unwrap();
    does("mount", &["-t", "tmpfs", "tmpfs", &at("mounted")]);
    std::fs::write(root.join("disk"), [0; 4096]).unwrap();
    let loop_device = does("losetup", &["-f", "--show", &at("disk")]);
    inside(&["ip", "tuntap", "add", "dev", "left0", "mode", "tap"]);
    inside(&["ip", "link", "add", "left1", "type", "bridge"]);
    inside(&["nft", "add", "table", "inet", "left"]);
    let namespace = format!("{mark}-left");
    does("ip", &["netns", "add", &namespace]);
    let socket = UnixListener::bind(root.join("left.sock")).unwrap();
    let cgroup = cgroup(&namespace);
    std::fs::write(daemon.data().join("left"), "").unwrap();
    daemon.ok(["create", "--name", "left", IMAGE, "true"]);
    let client = UnixStream::connect(daemon.socket()).unwrap();

    let mut missing = Vec::new();
    let all = comes_true(|| {
        let changes = daemon.inventory().since(&before);
        missing = [
            format!("Process sh -c read word {mark}"),
            format!("Mount tmpfs {}", at("mounted")),
            format!("Loop {loop_device}"),
            "Link left0 tun".to_owned(),
            "Link left1 bridge".to_owned(),
            "NftTable table inet left".to_owned(),
            format!("NetworkNamespace {namespace}"),
            format!("Socket {}", at("left.sock")),
            format!("Cgroup {}", cgroup.display()),
            format!("File {}", at("data/left")),
            "Row vms: ".to_owned(),
            "Descriptor socket".to_owned(),
        ]
        .into_iter()
        .filter(|thing| {
            let line = format!("left: {thing}");
            !changes.iter().any(|change| change.starts_with(&line))
        })
        .collect();
        missing.is_empty()
    });
    assert!(all, "the inventory overlooks {missing:?}");

    drop((socket, client));
    process.kill().unwrap();
    process.wait().unwrap();
    does("umount", &[&at("mounted")]);
    does("losetup", &["-d", &loop_device]);
    inside(&["ip", "link", "del", "left0"]);
    inside(&["ip", "link", "del", "left1"]);
    inside(&["nft", "delete", "table", "inet", "left"]);
    does("ip", &["netns", "del", &namespace]);
    std::fs::remove_dir(cgroup).unwrap();
    std::fs::remove_file(daemon.data().join("left")).unwrap();
    daemon.ok(["rm", "left"]);
    daemon.as_before(&before, "everything was taken away by hand");
    daemon.finish();
}
