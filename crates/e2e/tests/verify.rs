//! Whole lives of VMs, and then the host is as it was: `make verify`.
//!
//! The daemon has a network namespace of its own, so that every link, table and socket in it counts.

use std::path::Path;

use offshoot_e2e::{Daemon, IMAGE, Process, signal, text, wait_until};
use rustix::process::Signal;

const ROOTS: [&str; 4] = ["block", "pmem", "virtiofs", "copy"];
const MEMORY: [&str; 2] = ["--memory", "192m"];

/// `run -d` words for a VM that writes to its disks and reads from a share.
fn run<'a>(name: &'a str, root: &'a str, volume: &'a str) -> Vec<&'a str> {
    let mut words = vec!["--name", name, "--root", root, "-v", volume];
    words.extend(MEMORY);
    words.extend([
        IMAGE,
        "sh",
        "-c",
        "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done",
    ]);
    words
}

fn running(daemon: &Daemon, vm: &str) {
    wait_until("the agent to answer", || {
        daemon.cli(["exec", vm, "true"]).run().status.success()
    });
}

/// Starts a life with each kind of root, and gives the names.
fn start_all(daemon: &Daemon, share: &Path) -> Vec<String> {
    let volume = format!("{}:/share", share.display());
    let names: Vec<_> = ROOTS.iter().map(|root| format!("on-{root}")).collect();
    let runs: Vec<_> = names
        .iter()
        .zip(ROOTS)
        .map(|(name, root)| run(name, root, &volume))
        .collect();
    daemon.start_all(&runs);
    names
}

fn each<'a>(verb: &'a [&'a str], vms: &'a [String]) -> impl Iterator<Item = Vec<&'a str>> {
    vms.iter().map(move |vm| [verb, &[vm.as_str()]].concat())
}

fn kill_vmm(daemon: &Daemon, vm: &str) {
    let pid = daemon.inspect(vm)["pid"].as_i64().expect("a pid");
    signal(i32::try_from(pid).expect("a pid"), Signal::KILL);
}

#[test]
fn whole_lives_leave_the_host_as_it_was() {
    let mut daemon = Daemon::start();
    let share = daemon.root().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("word"), "shared").unwrap();
    let volume = format!("{}:/share:ro", share.display());

    // What is made once for an image and kept is no leftover, and neither is what the daemon opens once.
    for root in ["virtiofs", "copy"] {
        let once = [&["run", "--rm", "--root", root][..], &MEMORY, &[IMAGE, "true"]].concat();
        daemon.ok(once);
    }
    let before = daemon.inventory();

    // The whole life on every kind of root, side by side.
    let vms = start_all(&daemon, &share);
    for vm in &vms {
        daemon.ok([
            "exec",
            vm,
            "sh",
            "-c",
            "cat /share/word >/kept; cp /kept /root/kept; sync",
        ]);
    }
    daemon.all_ok(each(&["pause"], &vms));
    daemon.all_ok(each(&["resume"], &vms));
    daemon.all_ok(each(&["stop", "-t", "5"], &vms));
    let stopped = daemon.inventory().since(&before);
    assert!(
        !stopped.iter().any(|change| change.contains("Process")),
        "VMs that do not run:\n{}",
        stopped.join("\n")
    );
    daemon.all_ok(each(&["start"], &vms));
    for vm in &vms {
        assert_eq!(
            daemon.ok(["exec", vm, "cat", "/kept", "/root/kept"]),
            "sharedshared"
        );
    }
    daemon.all_ok(each(&["stop", "-t", "5"], &vms));
    daemon.all_ok(each(&["reset"], &vms));
    daemon.all_ok(each(&["rm"], &vms));
    daemon.as_before(&before, "whole lives on every kind of root");

    // Lives of one command, good and bad, and one that never begins.
    let once = [&["run", "--rm", "-v", volume.as_str()][..], &MEMORY, &[IMAGE]].concat();
    assert_eq!(
        daemon.ok([once.as_slice(), &["cat", "/share/word"]].concat()),
        "shared"
    );
    daemon
        .cli([once.as_slice(), &["sh", "-c", "exit 3"]].concat())
        .fails(3);
    daemon
        .cli([once.as_slice(), &["no-such-program"]].concat())
        .fails(127);
    daemon.ok(["create", "--name", "never", IMAGE, "true"]);
    daemon.ok(["rm", "never"]);
    daemon.as_before(&before, "run --rm");

    // Removed in the middle of their lives, and after a death of the VMM.
    let vms = start_all(&daemon, &share);
    let (dead, alive) = vms.split_at(2);
    for vm in dead {
        kill_vmm(&daemon, vm);
    }
    for vm in dead {
        wait_until("the dead VMM to be noticed", || daemon.state(vm) == "stopped");
    }
    daemon.ok(["pause", &alive[0]]);
    daemon.all_ok(each(&["rm", "-f"], &vms));
    daemon.as_before(&before, "rm -f and killed VMMs");

    // The daemon dies beside running VMs, and one of their VMMs while there is no daemon.
    let volume = format!("{}:/share", share.display());
    daemon.start_all(&[
        run("lives", "virtiofs", &volume),
        run("dies", "block", &volume),
        run("stays", "pmem", &volume),
    ]);
    kill_during_a_start(&mut daemon);
    kill_vmm_without_daemon(&mut daemon, "dies");
    running(&daemon, "lives");
    running(&daemon, "stays");
    wait_until("the lost VM to be noticed", || daemon.state("dies") == "stopped");
    daemon.ok(["stop", "-t", "5", "lives"]);
    daemon.ok(["rm", "-f", "lives", "dies", "stays", "half"]);
    daemon.as_before(&before, "deaths of the daemon");

    // Once more with the daemon ended as the system ends it.
    daemon.ok([
        &["run", "-d", "--name", "calm"][..],
        &MEMORY,
        &[IMAGE, "sleep", "1000"],
    ]
    .concat());
    daemon.terminate();
    assert!(
        Process::all()
            .iter()
            .any(|process| process.runs("qemu-system-x86_64") && process.concerns(daemon.root())),
        "the VM ended with the daemon"
    );
    daemon.start_again();
    running(&daemon, "calm");
    daemon.ok(["rm", "-f", "calm"]);
    daemon.as_before(&before, "an orderly end of the daemon");
    daemon.finish();
}

/// kill -9 of the daemon while a start is under way.
fn kill_during_a_start(daemon: &mut Daemon) {
    let words = [
        &["run", "-d", "--name", "half"][..],
        &MEMORY,
        &[IMAGE, "sleep", "1000"],
    ]
    .concat();
    let client = daemon.cli(words).spawn();
    wait_until("the start to begin", || {
        let output = daemon.cli(["inspect", "half"]).run();
        text(&output.stdout).contains("\"starting\"")
    });
    daemon.kill();
    let output = client.wait_with_output().unwrap();
    assert!(!output.status.success(), "the daemon was gone");
    daemon.start_again();
}

/// kill -9 of a VM's VMM while no daemon runs.
fn kill_vmm_without_daemon(daemon: &mut Daemon, vm: &str) {
    let pid = daemon.inspect(vm)["pid"].as_i64().expect("a pid");
    daemon.kill();
    signal(i32::try_from(pid).expect("a pid"), Signal::KILL);
    daemon.start_again();
}
