//! A data directory without room: clear errors, VMs that wait instead of breaking, and a database that agrees with the
//! host once there is room again.

use offshoot_e2e::{Daemon, IMAGE, Process, Random, tell, text, wait_until};

/// Beside the image: for two VMs that write a little.
const ROOM_MIB: u64 = 48;

fn words<'a>(verb: &[&'a str], name: &'a str) -> Vec<&'a str> {
    [
        verb,
        &["--name", name, "--memory", "192m", IMAGE, "sleep", "1000"],
    ]
    .concat()
}

/// It ends in time with a failure that says that there is no room, and what to do.
fn refused_for_room(daemon: &Daemon, words: &[&str]) {
    let output = daemon.cli(words).in_time();
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{words:?} succeeded without room");
    assert!(said.starts_with("error: "), "{words:?}: {said}");
    assert!(
        says_no_room(&said),
        "{words:?} does not say that there is no room: {said}"
    );
    assert!(said.contains("hint: "), "{words:?} gives no hint: {said}");
}

fn says_no_room(said: &str) -> bool {
    [
        "No space left",
        "disk is full",
        "no room",
        "too little room",
        "kept free",
    ]
    .iter()
    .any(|words| said.contains(words))
}

fn id(daemon: &Daemon, vm: &str) -> String {
    daemon.inspect(vm)["id"].as_str().expect("an id").to_owned()
}

/// Whether a VMM runs for this id.
fn has_vmm(id: &str) -> bool {
    let name = format!("guest=offshoot-{id}");
    Process::all().iter().any(|process| process.line.contains(&name))
}

/// Whether API, database and host say the same of a VM, and it is in none of the states that pass by themselves.
fn is_settled(daemon: &Daemon, vm: &str) -> bool {
    let state = daemon.state(vm);
    let id = id(daemon, vm);
    let stored = daemon.database().state(&id);
    stored.as_deref() == Some(&state)
        && !matches!(state.as_str(), "starting" | "stopping")
        && has_vmm(&id) == matches!(state.as_str(), "running" | "paused")
}

/// Waits for it, and for the agent where the VM runs: then it can be used or removed.
fn settles(daemon: &Daemon, vm: &str) {
    wait_until(&format!("API, database and host to agree about {vm}"), || {
        is_settled(daemon, vm)
            && (daemon.state(vm) != "running" || daemon.cli(["exec", vm, "true"]).run().status.success())
    });
}

#[test]
fn a_full_disk_loses_no_vm() {
    let daemon = Daemon::start_on_small_disk_with_image(ROOM_MIB);
    daemon.ok(words(&["run", "-d"], "writer"));
    daemon.ok(words(&["run", "-d"], "idle"));
    daemon.ok(words(&["create"], "new"));
    daemon.fill_disk(0);

    // Nothing new, and nothing half-made.
    let ids = daemon.ok(["ps", "-aq"]);
    refused_for_room(&daemon, &words(&["create"], "more"));
    refused_for_room(&daemon, &words(&["run", "-d"], "more"));
    assert_eq!(daemon.ok(["ps", "-aq"]), ids, "it left a VM");
    refused_for_room(&daemon, &["start", "new"]);
    // What runs is served, also where it says something that cannot be kept.
    assert_eq!(daemon.ok(["exec", "idle", "echo", "alive"]), "alive");
    assert_eq!(daemon.state("idle"), "running");

    // A guest that writes more than there is waits for room, and says so to its owner; it gets no error.
    let script = "dd if=/dev/urandom of=/root/fill bs=64k count=128 conv=fsync 2>&1 && sha256sum </root/fill";
    let writing = daemon.cli(["exec", "writer", "sh", "-c", script]).spawn();
    let reasons = || daemon.inspect("writer")["degraded"].to_string();
    wait_until("the writer to be told as waiting for room", || {
        reasons().contains("room") || reasons().contains("space")
    });
    assert_eq!(daemon.state("writer"), "running");
    assert_eq!(daemon.ok(["exec", "idle", "echo", "alive"]), "alive");
    daemon.free_disk();
    let output = writing.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the guest saw an error: {}",
        text(&output.stdout)
    );
    let sum = text(&output.stdout).lines().last().unwrap_or_default().to_owned();
    wait_until("the writer to be told as whole again", || reasons() == "[]");
    daemon.ok(["start", "new"]);
    assert_eq!(daemon.ok(["exec", "new", "echo", "works"]), "works");
    daemon.ok(["rm", "-f", "new"]);

    // Ended while the disk is full: done or refused, but never in between.
    daemon.fill_disk(0);
    for (verb, vm) in [(&["stop", "-t", "2"][..], "writer"), (&["kill"], "idle")] {
        let output = daemon.cli([verb, &[vm]].concat()).in_time();
        let said = text(&output.stderr);
        assert!(output.status.success() || says_no_room(&said), "{verb:?}: {said}");
    }
    daemon.free_disk();
    for vm in ["writer", "idle"] {
        settles(&daemon, vm);
        daemon.ok(["stop", "-t", "2", vm]);
        daemon.ok(["start", vm]);
    }
    let kept = daemon.ok(["exec", "writer", "sh", "-c", "sha256sum </root/fill"]);
    assert_eq!(kept, sum, "what was synced is whole");

    // Removed while the disk is full: gone, or there as before.
    daemon.fill_disk(0);
    let output = daemon.cli(["rm", "-f", "idle"]).in_time();
    assert!(
        output.status.success() || says_no_room(&text(&output.stderr)),
        "{}",
        text(&output.stderr)
    );
    daemon.free_disk();
    if daemon.cli(["inspect", "idle"]).run().status.success() {
        settles(&daemon, "idle");
        daemon.ok(["rm", "-f", "idle"]);
    }
    daemon.finish();
}

/// How much room is left for the database when an operation begins: a row or two, or what a whole operation takes.
const ROWS_KIB: u64 = 96;

/// Starts, stops and kills one VM, and creates and removes others, each time with other room for the database.
fn fills_up(daemon: &Daemon, amounts: &mut dyn Iterator<Item = u64>) {
    // It has its disks, so that a start takes little but rows.
    daemon.ok(words(&["run", "-d"], "vm"));
    daemon.ok(["stop", "-t", "1", "vm"]);
    let operations: [(&[&str], &str); 4] = [
        (&["start", "vm"], "running"),
        (&["stop", "-t", "1", "vm"], "stopped"),
        (&["start", "vm"], "running"),
        (&["kill", "vm"], "stopped"),
    ];
    for (n, leave) in amounts.enumerate() {
        let (operation, target) = operations[n % operations.len()];
        daemon.fill_disk(leave);
        let output = daemon.cli(operation).in_time();
        let said = text(&output.stderr);
        tell(&format!(
            "{operation:?} with {leave} KiB: {}; {said}",
            output.status
        ));
        daemon.free_disk();
        if !output.status.success() {
            assert!(
                says_no_room(&said) && said.contains("hint: "),
                "{operation:?} with {leave} KiB: {said}"
            );
            // What was done and could not be written is written before anything else; then it may be done already.
            let again = daemon.cli(operation).in_time();
            let said = text(&again.stderr);
            let done = format!("it is {target}");
            assert!(again.status.success() || said.contains(&done), "{said}");
        }
        settles(daemon, "vm");
        assert_eq!(daemon.state("vm"), target, "{operation:?} with {leave} KiB");

        let name = format!("new{n}");
        daemon.fill_disk(leave / 8 * 4);
        let created = daemon.cli(words(&["create"], &name)).in_time();
        let there = daemon.cli(["inspect", &name]).run().status.success();
        assert_eq!(created.status.success(), there, "create with {leave} KiB");
        let removed = daemon.cli(["rm", &name]).in_time();
        let still_there = daemon.cli(["inspect", &name]).run().status.success();
        daemon.free_disk();
        assert_eq!(
            still_there,
            there && !removed.status.success(),
            "rm with {leave} KiB"
        );
        if still_there {
            assert!(says_no_room(&text(&removed.stderr)), "{}", text(&removed.stderr));
            daemon.ok(["rm", &name]);
        }
    }
    assert_eq!(daemon.database().integrity(), "ok");
}

#[test]
fn a_database_that_fills_up_in_the_middle_agrees_with_the_host_afterwards() {
    let mut random = Random::seeded();
    let mut amounts = (0..4).map(|_| 4 * (random.fraction() * ROWS_KIB as f64 / 4.0) as u64);
    let daemon = Daemon::start_on_small_disk_with_image(ROOM_MIB);
    fills_up(&daemon, &mut amounts);
    daemon.finish();
}

/// The same at every page, with VMs that cost nothing.
#[test]
fn a_database_that_fills_up_at_any_page_agrees_with_the_host_afterwards() {
    // All four operations for each amount of room.
    let mut amounts = (0..=ROWS_KIB / 4).step_by(2).flat_map(|pages| [4 * pages; 4]);
    let daemon = Daemon::start_fake_on_small_disk(ROOM_MIB);
    fills_up(&daemon, &mut amounts);
    daemon.finish();
}
