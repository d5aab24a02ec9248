//! A data directory that turns read-only: under a running daemon, and before one starts. VMs run on, and none is lost.

use offshoot_e2e::{Daemon, IMAGE, text, wait_until};

fn words<'a>(verb: &[&'a str], name: &'a str) -> Vec<&'a str> {
    [
        verb,
        &["--name", name, "--memory", "192m", IMAGE, "sleep", "1000"],
    ]
    .concat()
}

fn says_read_only(said: &str) -> bool {
    let said = said.to_lowercase();
    said.contains("read-only") || said.contains("readonly")
}

fn answers(daemon: &Daemon, vm: &str) {
    wait_until("the agent to answer", || {
        daemon.cli(["exec", vm, "true"]).run().status.success()
    });
}

#[test]
fn a_read_only_data_directory_loses_no_vm() {
    let mut daemon = Daemon::start_on_small_disk_with_image(48);
    daemon.ok(words(&["run", "-d"], "up"));
    daemon.ok(words(&["run", "-d"], "leaves"));
    daemon.ok(words(&["create"], "down"));
    let ids = daemon.ok(["ps", "-aq"]);

    // Under a running daemon.
    let closed = daemon.close_data();
    for refused in [&["start", "down"][..], &words(&["run", "-d"], "more")] {
        let output = daemon.cli(refused).in_time();
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{refused:?} succeeded");
        assert!(
            said.starts_with("error: ") && says_read_only(&said) && said.contains("hint: "),
            "{refused:?}: {said}"
        );
    }
    assert_eq!(daemon.ok(["exec", "up", "echo", "alive"]), "alive");
    // What may be done without a new file is done.
    let output = daemon.cli(["stop", "-t", "2", "leaves"]).in_time();
    assert!(
        output.status.success() || says_read_only(&text(&output.stderr)),
        "{}",
        text(&output.stderr)
    );
    drop(closed);
    wait_until("the stopped VM to be told as such", || {
        daemon.cli(["stop", "-t", "2", "leaves"]).run().status.success()
            && daemon.state("leaves") == "stopped"
    });
    let _ = daemon.cli(["rm", "-f", "more"]).run();
    assert_eq!(
        daemon.ok(["ps", "-aq"]),
        ids,
        "a VM is lost, or a half-made one is there"
    );
    daemon.all_ok([vec!["start", "down"], vec!["start", "leaves"]]);
    for vm in ["up", "down", "leaves"] {
        answers(&daemon, vm);
    }
    daemon.all_ok(["down", "leaves"].map(|vm| vec!["stop", "-t", "1", vm]));

    // Before a daemon starts, beside a running VM.
    let pid = daemon.inspect("up")["pid"].clone();
    daemon.kill();
    let closed = daemon.close_data();
    let log = daemon.fails_to_start();
    assert!(says_read_only(&log), "{log}");
    drop(closed);
    daemon.start_again();
    answers(&daemon, "up");
    assert_eq!(daemon.inspect("up")["pid"], pid, "the VM did not run on");
    daemon.ok(["stop", "-t", "1", "up"]);

    // The whole file system, when nothing runs.
    daemon.terminate();
    daemon.set_disk_read_only(true);
    let log = daemon.fails_to_start();
    assert!(says_read_only(&log), "{log}");
    daemon.set_disk_read_only(false);
    daemon.start_again();
    assert_eq!(daemon.ok(["ps", "-aq"]), ids, "a VM is lost");
    daemon.ok(["start", "up"]);
    assert_eq!(daemon.ok(["exec", "up", "echo", "back"]), "back");
    daemon.finish();
}
