//! The life of a VM: states, restarts of the daemon, and that nothing is left behind.

use offshoot_e2e::{Daemon, IMAGE, names, signal, text, wait_until};
use rustix::process::Signal;

#[test]
fn ten_vms_share_one_base_and_take_little_each() {
    let daemon = Daemon::start();
    let vms: Vec<String> = (0..10).map(|n| format!("vm{n}")).collect();
    let children: Vec<_> = vms
        .iter()
        .map(|vm| {
            daemon
                .cli(["run", "-d", "--name", vm, IMAGE, "sleep", "1000"])
                .spawn()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    for (n, vm) in vms.iter().enumerate() {
        // What one writes is its own.
        daemon.ok(["exec", vm, "sh", "-c", &format!("echo {n} > /etc/mine")]);
    }
    for (n, vm) in vms.iter().enumerate() {
        assert_eq!(daemon.ok(["exec", vm, "cat", "/etc/mine"]), n.to_string());
    }
    assert_eq!(names(&daemon.data().join("bases")).len(), 1, "one base");
    for vm in &vms {
        let details = daemon.inspect(vm);
        let folder = details["directory"].as_str().unwrap();
        let du = std::process::Command::new("du")
            .args(["-sk", folder])
            .output()
            .unwrap();
        let kib: u64 = text(&du.stdout)
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!(kib < 2048, "{vm} takes {kib} KiB");
        assert!(kib > 0);
    }
    daemon.finish();
}

#[test]
fn vms_outlive_a_killed_daemon() {
    let mut daemon = Daemon::start();
    daemon.ok([
        "run",
        "-d",
        "--name",
        "steady",
        IMAGE,
        "sh",
        "-c",
        "n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done",
    ]);
    daemon.ok([
        "run",
        "-d",
        "--name",
        "brief",
        IMAGE,
        "sh",
        "-c",
        "while ! test -e /go; do sleep 0.1; done; echo bye; exit 6",
    ]);
    let mut parting = daemon
        .cli(["exec", "brief", "sh", "-c", "touch /heard; sleep 2; touch /go"])
        .spawn();
    let pid = daemon.inspect("steady")["pid"].as_i64().unwrap();
    wait_until("the order to go to be heard", || {
        let heard = daemon.cli(["exec", "brief", "test", "-e", "/heard"]).run();
        heard.status.success()
    });
    wait_until("some output", || {
        daemon.ok(["logs", "steady"]).lines().count() > 3
    });
    daemon.kill();
    let _ = parting.wait();
    // The main process of `brief` ends while no daemon runs: its status and last words are kept for the next one.
    daemon.start_again();
    assert_eq!(
        daemon.inspect("steady")["pid"].as_i64(),
        Some(pid),
        "the same process"
    );
    wait_until("the agent to be found again", || {
        daemon.cli(["exec", "steady", "true"]).run().status.success()
    });
    assert_eq!(daemon.ok(["exec", "steady", "echo", "again"]), "again");
    assert_eq!(daemon.ok(["wait", "brief"]), "6");
    assert_eq!(daemon.ok(["logs", "brief"]), "bye");
    // No line is missing or twice.
    let counted = daemon.ok(["logs", "steady"]);
    let numbers: Vec<u64> = counted.lines().map(|line| line.parse().unwrap()).collect();
    assert!(
        numbers.iter().enumerate().all(|(n, number)| n as u64 == *number),
        "{numbers:?}"
    );
    let console = daemon.cli(["logs", "--console", "steady"]).run();
    assert!(console.status.success(), "{}", text(&console.stderr));
    // Once more, and stop in the usual way.
    daemon.kill();
    daemon.start_again();
    wait_until("the agent to be found again", || {
        daemon.cli(["exec", "steady", "true"]).run().status.success()
    });
    daemon.ok(["stop", "-t", "2", "steady"]);
    assert_eq!(daemon.state("steady"), "stopped");
    daemon.finish();
}

#[test]
fn a_vm_keeps_its_files_over_stop_and_start() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "keeper", IMAGE, "sleep", "1000"]);
    daemon.ok([
        "exec",
        "keeper",
        "sh",
        "-c",
        "echo precious > /root/file; rm /etc/motd; mkdir /opt/new",
    ]);
    daemon.ok(["stop", "-t", "1", "keeper"]);
    assert_eq!(daemon.state("keeper"), "stopped");
    // A clean shutdown unmounts: the disk needs no repair.
    let folder = daemon.inspect("keeper")["directory"].as_str().unwrap().to_owned();
    let checked = std::process::Command::new("/usr/sbin/e2fsck")
        .args(["-fn", &format!("{folder}/overlay.ext4")])
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", text(&checked.stdout));
    assert!(
        !text(&checked.stdout).contains("recovering journal"),
        "{}",
        text(&checked.stdout)
    );
    daemon.ok(["start", "keeper"]);
    assert_eq!(daemon.ok(["exec", "keeper", "cat", "/root/file"]), "precious");
    daemon.cli(["exec", "keeper", "test", "-e", "/etc/motd"]).fails(1);

    // Pulling the plug after a sync loses nothing either.
    daemon.ok(["exec", "keeper", "sh", "-c", "echo more > /root/more; sync"]);
    daemon.ok(["kill", "keeper"]);
    daemon.ok(["start", "keeper"]);
    assert_eq!(
        daemon.ok(["exec", "keeper", "cat", "/root/file", "/root/more"]),
        "precious\nmore"
    );
    daemon.ok(["restart", "-t", "1", "keeper"]);
    assert_eq!(daemon.ok(["exec", "keeper", "cat", "/root/file"]), "precious");
    daemon.finish();
}

#[test]
fn the_life_of_a_vm_is_told_as_docker_tells_it() {
    let daemon = Daemon::start();
    let id = daemon.ok(["create", "--name", "told", IMAGE, "sh", "-c", "sleep 1000"]);
    assert_eq!(daemon.state("told"), "created");
    assert_eq!(daemon.ok(["ps", "-q"]), "");
    assert_eq!(daemon.ok(["start", "told"]), "told");
    assert_eq!(daemon.ok(["ps", "-q"]), id);
    let table = daemon.ok(["ps"]);
    assert!(table.contains("told") && table.contains("Up "), "{table}");
    daemon.ok(["pause", "told"]);
    assert_eq!(daemon.state("told"), "paused");
    let paused = daemon.cli(["exec", "told", "true"]).fails(1);
    assert!(paused.contains("offshoot resume told"), "{paused}");
    daemon.ok(["resume", "told"]);
    assert_eq!(daemon.ok(["exec", "told", "echo", "awake"]), "awake");
    let running = daemon.cli(["rm", "told"]).fails(1);
    assert!(running.contains("offshoot stop told"), "{running}");
    daemon.ok(["rename", "told", "retold"]);
    daemon.ok(["kill", "-s", "TERM", "retold"]);
    assert_eq!(daemon.ok(["wait", "retold"]), "143");
    let table = daemon.ok(["ps", "-a"]);
    assert!(table.contains("Exited (143)"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&daemon.ok(["ps", "-a", "--output", "json"])).unwrap();
    assert_eq!(json[0]["name"], "retold");
    assert_eq!(json[0]["exit"]["code"], 143);
    let timings = daemon.ok(["inspect", "--timings", "retold"]);
    for stage in [
        "overlay.prepare",
        "vmm.prepare",
        "agent.after_boot",
        "main.after_boot",
    ] {
        assert!(timings.contains(stage), "{timings}");
    }
    daemon.ok(["rm", "retold"]);
    daemon.finish();
}

#[test]
fn a_guest_or_a_vmm_that_ends_by_itself_is_noticed() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "a", IMAGE, "sleep", "1000"]);
    daemon.ok(["run", "-d", "--name", "b", IMAGE, "sleep", "1000"]);
    let pid = daemon.inspect("a")["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_until("the killed VMM to be noticed", || daemon.state("a") == "stopped");
    assert_eq!(daemon.inspect("a")["exit"]["reason"], "vmm-died");
    // The guest's kernel panics: `panic=-1` resets, and a reset ends the VMM.
    let _ = daemon
        .cli(["exec", "b", "sh", "-c", "echo c > /proc/sysrq-trigger"])
        .run();
    wait_until("the panic to be noticed", || daemon.state("b") == "stopped");
    let console = daemon.ok(["logs", "--console", "b"]);
    assert!(console.contains("anic"), "{console}");
    daemon.ok(["start", "a"]);
    assert_eq!(daemon.ok(["exec", "a", "echo", "back"]), "back");
    daemon.finish();
}

#[test]
fn nothing_is_open_to_those_whom_it_does_not_concern() {
    use std::os::unix::fs::MetadataExt as _;
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "closed", IMAGE, "sleep", "1000"]);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&daemon.socket()), 0o660);
    assert_eq!(mode(&daemon.data()), 0o710);
    assert_eq!(mode(&daemon.data().join("offshoot.db")), 0o600);
    assert_eq!(mode(&daemon.data().join("blobs")), 0o700);
    let details = daemon.inspect("closed");
    let overlay = std::path::Path::new(details["directory"].as_str().unwrap()).join("overlay.ext4");
    assert_eq!(mode(&overlay), 0o600);
    // What the daemon reads again after a restart lies where the VMM can write nothing.
    for folder in [overlay.parent().unwrap(), daemon.run_folder("closed").as_path()] {
        let folder = std::fs::metadata(folder).unwrap();
        assert_eq!((folder.uid(), folder.mode() & 0o777), (0, 0o710));
    }

    // The VMM is a user of its own, without capabilities, that can gain none, behind a seccomp filter.
    let status = std::fs::read_to_string(format!("/proc/{}/status", details["pid"])).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let uid: u32 = field("Uid:").parse().unwrap();
    assert!(uid >= 1_900_000_001, "{uid}");
    assert_eq!(uid, std::fs::metadata(&overlay).unwrap().uid());
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("CapPrm:"), "0000000000000000");
    assert_eq!(field("CapInh:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    daemon.finish();
}

#[test]
fn ctrl_c_undoes_a_start() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "patient", IMAGE, "sleep", "1000"]);
    let child = daemon.cli(["start", "patient"]).spawn();
    wait_until("the start", || daemon.state("patient") == "starting");
    wait_until("its VMM", || !daemon.vmms().is_empty());
    signal(i32::try_from(child.id()).unwrap(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_eq!(daemon.state("patient"), "created", "as if nobody had started it");
    assert_eq!(daemon.vmms().len(), 0);
    assert_eq!(names(&daemon.root().join("run/vms")), [""; 0]);
    daemon.ok(["start", "patient"]);
    daemon.ok(["exec", "patient", "true"]);
    daemon.finish();
}
