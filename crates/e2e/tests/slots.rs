//! Warm slots: a VM that takes one over is a VM as any other, and nothing is left of one that nobody took.

use offshoot_e2e::{Daemon, IMAGE, names, tell, wait_until};
use serde_json::{Value, json};

/// What tells a VM from every other, a line each: address, names, ids, and a digest of random bytes.
const WHO: &str = "cat /sys/class/net/eth0/address; hostname; cat /etc/hostname /etc/machine-id \
     /proc/sys/kernel/random/boot_id; head -c 1048576 /dev/urandom | sha256sum; hostname -I";

fn slots(daemon: &Daemon) -> u64 {
    daemon.get_json("/v1/system/df")["slots"]["count"]
        .as_u64()
        .expect("a number")
}

fn has(daemon: &Daemon, count: u64) {
    wait_until(&format!("{count} warm slots"), || slots(daemon) == count);
}

fn warm(daemon: &Daemon, count: u64) {
    daemon.ok(["image", "warm", IMAGE, &count.to_string()]);
    has(daemon, count);
}

fn run(daemon: &Daemon, vm: &str, more: &[&str]) {
    let words = [&["run", "-d", "--name", vm], more, &[IMAGE, "sleep", "100000"]].concat();
    daemon.ok(words);
}

/// Why it booted as it did.
fn reason(daemon: &Daemon, vm: &str) -> String {
    let reason = &daemon.inspect(vm)["boot"]["reasons"][0];
    reason.as_str().expect("a reason").to_owned()
}

fn who(daemon: &Daemon, vm: &str) -> Vec<String> {
    let said = daemon.ok(["exec", vm, "sh", "-c", WHO]);
    said.lines().map(str::to_owned).collect()
}

#[test]
fn a_vm_in_a_warm_slot_is_a_vm_of_its_own() {
    let daemon = Daemon::start();
    // What is made once, and a VM that never was in a slot.
    run(&daemon, "slow", &["--boot", "template"]);
    let before = daemon.inventory();
    warm(&daemon, 2);
    run(&daemon, "one", &[]);
    run(&daemon, "two", &["--disk", "20g"]);
    for vm in ["one", "two"] {
        let reason = reason(&daemon, vm);
        assert!(reason.contains("warm slot"), "{vm}: {reason}");
    }
    let everybody: Vec<_> = ["slow", "one", "two"].iter().map(|vm| who(&daemon, vm)).collect();
    for (line, slow) in everybody[0].iter().enumerate() {
        assert!(
            *slow != everybody[1][line]
                && *slow != everybody[2][line]
                && everybody[1][line] != everybody[2][line],
            "line {line}: {everybody:?}"
        );
    }
    assert_eq!(everybody[1][1], "one");
    // Mounted alike, and as large as each was asked to be.
    let facts = |vm: &str, what: &str| daemon.ok(["exec", vm, "sh", "-c", what]);
    for what in [
        "cut -d' ' -f1-4 /proc/mounts",
        "id; env | grep -v HOSTNAME; ls -la --time-style=+ / /root; ulimit -a",
    ] {
        let strip = |text: String| {
            // How many processes there are is the moment's.
            let free = ["overlay / overlay", "total ", " proc"];
            let plain = |line: &&str| {
                !free
                    .iter()
                    .any(|part| line.contains(part) && !line.contains("/proc"))
            };
            text.lines().filter(plain).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(strip(facts("one", what)), strip(facts("slow", what)), "{what}");
    }
    let gib = |vm: &str| facts(vm, "df --output=size -BG / | tail -1").trim().to_owned();
    assert_eq!((gib("one"), gib("two")), (gib("slow"), "20G".to_owned()));
    // What one writes, no other sees, and it is there after a restart of its own.
    facts("one", "echo mine > /root/mine; echo mine > /etc/mine; sync");
    assert!(
        !daemon
            .cli(["exec", "two", "cat", "/root/mine"])
            .run()
            .status
            .success()
    );
    daemon.ok(["restart", "one"]);
    assert_eq!(facts("one", "cat /root/mine /etc/mine"), "mine\nmine");
    assert_eq!(who(&daemon, "one")[..4], everybody[1][..4], "over a restart");

    // What does not fit takes none.
    has(&daemon, 2);
    run(&daemon, "large", &["--memory", "300m"]);
    assert!(!reason(&daemon, "large").contains("warm slot"));
    run(&daemon, "cold", &["--boot", "cold"]);
    assert_eq!(reason(&daemon, "cold"), "asked for");
    has(&daemon, 2);
    let df: Value = daemon.get_json("/v1/system/df");
    assert!(df["slots"]["memory"]["pss"].as_u64().unwrap() > 10 << 20, "{df}");
    assert!(daemon.ok(["df"]).contains("Slots:   2 warm"));
    daemon.ok(["rm", "-f", "one", "two", "large", "cold"]);
    warm(&daemon, 0);
    daemon.as_before(&before, "warm slots");
    daemon.finish();
}

#[test]
fn nothing_is_left_of_slots_when_the_daemon_ends_or_is_killed() {
    let mut daemon = Daemon::start_with(&format!("warm_slots = {{ {IMAGE:?} = 1 }}"));
    has(&daemon, 1);
    assert_eq!(daemon.vmms().len(), 1);
    daemon.kill();
    daemon.set_settings("");
    daemon.start_again();
    wait_until("the slot's VMM to be gone", || daemon.vmms().is_empty());
    let folders = [daemon.data().join("vms"), daemon.root().join("run/vms")];
    wait_until("its folders to be gone", || {
        folders.iter().all(|folder| names(folder).is_empty())
    });
    assert_eq!(daemon.database().rows_of_vms(), [""; 0]);

    // Taken, and the daemon dies before the VM is started.
    warm(&daemon, 1);
    let (status, vm) = daemon.post(
        "/v1/vms",
        &json!({"name": "taken", "image": IMAGE, "cmd": ["sleep", "1000"]}),
    );
    assert_eq!(status, 201, "{vm}");
    daemon.kill();
    daemon.start_again();
    wait_until("the slot's VMM to be gone", || daemon.vmms().is_empty());
    assert_eq!(daemon.state("taken"), "created");
    daemon.ok(["start", "taken"]);
    daemon.ok(["exec", "taken", "true"]);
    daemon.ok(["rm", "-f", "taken"]);

    // Taken and removed before it is started; and an orderly end.
    warm(&daemon, 1);
    daemon.ok(["create", "--name", "never", IMAGE, "true"]);
    daemon.ok(["rm", "never"]);
    has(&daemon, 1);
    assert!(daemon.terminate().success());
    assert!(daemon.vmms().is_empty(), "slots end with the daemon");
    daemon.start_again();
    warm(&daemon, 1);
    daemon.drain();
    assert!(daemon.vmms().is_empty(), "slots end when the daemon is drained");
    daemon.start_again();
    daemon.finish();
}

#[test]
fn a_slot_that_dies_costs_no_vm() {
    let daemon = Daemon::start();
    warm(&daemon, 1);
    let (_, vmm) = daemon.vmms().remove(0);
    offshoot_e2e::signal(vmm.pid, rustix::process::Signal::KILL);
    run(&daemon, "web", &[]);
    assert!(!reason(&daemon, "web").contains("warm slot"));
    daemon.ok(["exec", "web", "true"]);
    has(&daemon, 1);
    warm(&daemon, 0);
    daemon.finish();
}

/// The stages of a slot's making, and of the start that takes one.
const POINTS: [&str; 9] = [
    "slot/overlay.prepare/after",
    "slot/vmm.prepare/before",
    "slot/vmm.prepare/after",
    "slot/answer/after",
    "slot/warm/after",
    "slot/first-command/after",
    "slot/pause/after",
    "start/row/after",
    "start/agent.after_boot/after",
];

#[test]
fn a_daemon_that_dies_while_a_slot_is_made_or_taken_leaves_nothing() {
    let mut daemon = Daemon::start();
    daemon.ok(["run", "--rm", "--boot", "template", IMAGE, "true"]);
    // A daemon that has not loaded the template.
    daemon.kill();
    daemon.start_again();
    let before = daemon.inventory();
    for point in POINTS {
        daemon.kill();
        daemon.start_again_with(&[("OFFSHOOT_FAIL_POINT", point)]);
        daemon.ok(["image", "warm", IMAGE, "1"]);
        if point.starts_with("start/") {
            has(&daemon, 1);
            let taken = ["run", "-d", "--name", "taken", IMAGE, "sleep", "1000"];
            assert!(!daemon.cli(taken).run().status.success(), "{point}");
        }
        daemon.wait_ended();
        daemon.start_again();
        if point.starts_with("start/") {
            wait_until("a state of rest", || daemon.state("taken") != "starting");
            daemon.ok(["rm", "-f", "taken"]);
        }
        wait_until("the slot's VMM to be gone", || daemon.vmms().is_empty());
        daemon.as_before(&before, point);
        tell(point);
    }
    daemon.finish();
}
