//! Idle TAPs: made behind the back of starts, taken by them, found again by the next daemon, given back, and counted.
//!
//! The VMM is the fake, which has a real TAP; `network.rs` has real guests on the other end.

use std::collections::BTreeSet;

use offshoot_e2e::{Daemon, IMAGE, Scrape, tell, wait_until};
use serde_json::Value;

/// How many there are by default.
const SIZE: usize = 4;

/// The interfaces of the namespace whose names begin so.
fn links(daemon: &Daemon, prefix: &str) -> Vec<Value> {
    let said = daemon
        .namespace()
        .ok(&["ip", "-json", "-details", "link", "show"]);
    let Value::Array(mut links) = serde_json::from_str(&said).unwrap() else {
        panic!("no list: {said}")
    };
    links.retain(|link| name(link).starts_with(prefix));
    links
}

fn name(link: &Value) -> &str {
    link["ifname"].as_str().unwrap_or_default()
}

fn names(daemon: &Daemon, prefix: &str) -> BTreeSet<String> {
    links(daemon, prefix)
        .iter()
        .map(|link| name(link).to_owned())
        .collect()
}

fn is_up(link: &Value) -> bool {
    link["flags"]
        .as_array()
        .is_some_and(|flags| flags.iter().any(|flag| flag == "UP"))
}

fn is_persistent(link: &Value) -> bool {
    link["linkinfo"]["info_data"]["persist"]
        .as_bool()
        .expect("what `ip` says of a TAP")
}

fn run(daemon: &Daemon, vm: &str) {
    daemon.ok(["run", "-d", "--name", vm, IMAGE, "sleep", "1000"]);
}

/// Waits until so many are idle.
fn has(daemon: &Daemon, idle: usize) {
    wait_until(&format!("{idle} idle TAPs"), || {
        daemon.at_rest();
        links(daemon, "osp-").len() == idle
    });
}

fn claims(daemon: &Daemon) -> (f64, f64) {
    let scrape = Scrape::parse(&daemon.get("/metrics").body);
    let name = "offshoot_tap_pool_claims_total";
    let of = |outcome| scrape.value(name, &[("outcome", outcome)]);
    (of("hit"), of("miss"))
}

#[test]
fn a_start_takes_one_that_is_ready_and_it_ends_with_its_vm() {
    let daemon = Daemon::start_fake("");
    assert_eq!(daemon.idle_taps(), (0, 0), "no network has a bridge yet");
    run(&daemon, "first");
    has(&daemon, SIZE);
    let bridge = links(&daemon, "ofs-").remove(0);
    for idle in links(&daemon, "osp-") {
        assert!(is_persistent(&idle) && !is_up(&idle), "{idle}");
        assert_eq!(idle["master"], bridge["ifname"], "{idle}");
        assert_eq!(idle["linkinfo"]["info_data"]["user"], "root", "{idle}");
    }
    run(&daemon, "second");
    assert_eq!(claims(&daemon), (1.0, 1.0), "the first VM came before the pool");

    let taps = links(&daemon, "os-");
    assert_eq!(taps.len(), 2);
    for tap in &taps {
        assert!(!is_persistent(tap) && is_up(tap), "{tap}");
        assert_eq!(tap["master"], bridge["ifname"]);
    }
    // Which of them was idle before can be told only by what the kernel noted of its past: it lost and found its carrier.
    let alike = |tap: &Value| {
        let mut tap = tap.clone();
        let port = &mut tap["linkinfo"]["info_slave_data"];
        for own in ["id", "no", "designated_port"] {
            port.as_object_mut().expect("a port of a bridge").remove(own);
        }
        for own in ["ifname", "ifindex", "address", "operstate"] {
            tap.as_object_mut().expect("an interface").remove(own);
        }
        tap
    };
    assert_eq!(alike(&taps[0]), alike(&taps[1]));

    let pid = daemon.inspect("second")["pid"].as_i64().expect("a pid");
    offshoot_e2e::signal(i32::try_from(pid).unwrap(), rustix::process::Signal::KILL);
    wait_until("the TAP to end with its VMM", || links(&daemon, "os-").len() == 1);
    daemon.ok(["rm", "-f", "first", "second"]);
    has(&daemon, SIZE);
    let doctor = daemon.ok(["doctor"]);
    assert!(doctor.contains("4 of 4 TAPs are ready"), "{doctor}");
    assert!(daemon.ok(["system", "info"]).contains("Idle TAPs:       4 of 4"));
    daemon.finish();
}

#[test]
fn the_next_daemon_goes_on_with_what_is_there() {
    let mut daemon = Daemon::start_fake("");
    run(&daemon, "one");
    has(&daemon, SIZE);
    let before = names(&daemon, "osp-");
    for end in [Daemon::kill, |daemon: &mut Daemon| {
        assert!(daemon.terminate().success());
    }] {
        end(&mut daemon);
        assert_eq!(names(&daemon, "osp-"), before, "they outlive the daemon");
        daemon.start_again();
        has(&daemon, SIZE);
        assert_eq!(names(&daemon, "osp-"), before, "and the next one makes no others");
    }
    run(&daemon, "two");
    assert_eq!(claims(&daemon), (1.0, 0.0));

    // Somebody takes some away, or changes them.
    has(&daemon, SIZE);
    daemon.kill();
    let idle: Vec<_> = names(&daemon, "osp-").into_iter().collect();
    daemon.namespace().ok(&["ip", "link", "del", &idle[0]]);
    daemon
        .namespace()
        .ok(&["ip", "link", "set", &idle[1], "nomaster"]);
    daemon.namespace().ok(&["ip", "link", "set", &idle[2], "up"]);
    daemon.start_again();
    has(&daemon, SIZE);
    assert!(
        links(&daemon, "osp-")
            .iter()
            .all(|idle| !is_up(idle) && !idle["master"].is_null())
    );
    // And behind the back of a daemon that runs: what is not there is made.
    for idle in names(&daemon, "osp-") {
        daemon.namespace().ok(&["ip", "link", "del", &idle]);
    }
    run(&daemon, "three");
    assert_eq!(links(&daemon, "os-").len(), 3);
    assert!(
        links(&daemon, "os-")
            .iter()
            .all(|tap| is_up(tap) && !is_persistent(tap) && !tap["master"].is_null())
    );
    daemon.ok(["rm", "-f", "one", "two", "three"]);

    // A smaller pool, and none.
    for size in [1, 0] {
        assert!(daemon.terminate().success());
        daemon.set_settings(&Daemon::fake_settings(&format!("tap_pool_size = {size}")));
        daemon.start_again();
        has(&daemon, size);
    }
    wait_until("the bridge to go with its pool", || {
        links(&daemon, "o").is_empty()
    });
    run(&daemon, "four");
    assert_eq!(
        (links(&daemon, "os-").len(), links(&daemon, "osp-").len()),
        (1, 0)
    );
    daemon.ok(["rm", "-f", "four"]);
    assert!(links(&daemon, "o").is_empty(), "the bridge went with its last VM");
    daemon.finish();
}

#[test]
fn a_network_that_is_removed_takes_its_pool_along_and_a_drained_daemon_has_none() {
    let mut daemon = Daemon::start_fake("");
    daemon.ok(["net", "create", "lab"]);
    daemon.ok([
        "run",
        "-d",
        "--name",
        "in-lab",
        "--network",
        "lab",
        IMAGE,
        "sleep",
        "1000",
    ]);
    run(&daemon, "outside");
    has(&daemon, 2 * SIZE);
    daemon.cli(["net", "rm", "lab"]).fails(1);
    daemon.ok(["rm", "-f", "in-lab"]);
    daemon.ok(["net", "rm", "lab"]);
    has(&daemon, SIZE);
    assert_eq!(links(&daemon, "ofs-").len(), 1);

    // The VM that runs keeps its TAP and its bridge.
    daemon.drain();
    assert_eq!(
        (links(&daemon, "osp-").len(), links(&daemon, "os-").len()),
        (0, 1)
    );
    assert_eq!(links(&daemon, "ofs-").len(), 1);
    daemon.start_again();
    has(&daemon, SIZE);
    daemon.ok(["rm", "-f", "outside"]);

    // A request for another daemon ends none.
    let (status, answer) = daemon.post(
        "/v1/system/shutdown",
        &serde_json::json!({"pid": 1, "drain": true}),
    );
    assert_eq!(status, 409, "{answer}");
    has(&daemon, SIZE);
    daemon.finish();
}

/// Dies at one place of a life of the pool; the next daemon has what it should have, and nothing more.
fn crash_at(daemon: &mut Daemon, point: &str, life: impl Fn(&Daemon)) {
    daemon.kill();
    daemon.start_again_with(&[("OFFSHOOT_FAIL_POINT", point)]);
    life(daemon);
    daemon.wait_ended();
    daemon.start_again();
    wait_until(&format!("a state of rest after {point}"), || {
        let states = daemon.ok(["ps", "-a", "--output", "json"]);
        !states.contains("\"starting\"") && daemon.vmms().is_empty()
    });
    wait_until(&format!("no TAP of a VM after {point}"), || {
        links(daemon, "os-").is_empty()
    });
    let all = daemon.ok(["ps", "-aq"]);
    if !all.is_empty() {
        daemon.ok(["rm", "-f", all.trim()]);
    }
    tell(point);
}

#[test]
fn a_daemon_that_dies_while_it_takes_or_fills_leaves_nothing() {
    let mut daemon = Daemon::start_fake("");
    run(&daemon, "first");
    has(&daemon, SIZE);
    daemon.ok(["rm", "-f", "first"]);
    let before = daemon.inventory();
    let starts = |daemon: &Daemon| {
        let output = daemon
            .cli(["run", "-d", "--name", "crash", IMAGE, "sleep", "1000"])
            .run();
        assert!(!output.status.success(), "the daemon was to die");
    };
    for point in ["take/before", "take/after", "rename/after"] {
        crash_at(&mut daemon, &format!("tap-pool/{point}"), starts);
        has(&daemon, SIZE);
        daemon.as_before(&before, point);
    }
    // Refilling begins a moment after a start.
    let lives = |daemon: &Daemon| {
        let _ = daemon.cli(["run", "--rm", IMAGE, "true"]).run();
    };
    for point in ["make/before", "make/after", "keep/after"] {
        crash_at(&mut daemon, &format!("tap-pool/{point}"), lives);
        has(&daemon, SIZE);
        daemon.as_before(&before, point);
    }
    let drains = |daemon: &Daemon| {
        let output = daemon.cli(["system", "shutdown", "--drain"]).run();
        assert!(!output.status.success(), "the daemon was to die");
    };
    for point in ["remove/before", "remove/after"] {
        crash_at(&mut daemon, &format!("tap-pool/{point}"), drains);
        has(&daemon, SIZE);
        daemon.as_before(&before, point);
    }
    daemon.finish();
}

#[test]
fn a_hundred_lives_leave_as_many_taps_processes_descriptors_files_and_rows() {
    let daemon = Daemon::start_fake("");
    daemon.ok(["run", "--rm", IMAGE, "true"]);
    has(&daemon, SIZE);
    let before = daemon.inventory();
    for life in 0..100 {
        let vm = format!("life-{life}");
        run(&daemon, &vm);
        daemon.ok(["rm", "-f", &vm]);
    }
    daemon.as_before(&before, "a hundred lives, one after another");
    // Eight at a time: more than are ready.
    let vms: Vec<_> = (0..8).map(|n| format!("side-{n}")).collect();
    for _ in 0..5 {
        let runs: Vec<_> = vms
            .iter()
            .map(|vm| vec!["--name", vm.as_str(), IMAGE, "sleep", "1000"])
            .collect();
        daemon.start_all(&runs);
        daemon.all_ok(vms.iter().map(|vm| vec!["rm", "-f", vm.as_str()]));
    }
    daemon.as_before(&before, "forty lives side by side");
    let (hits, misses) = claims(&daemon);
    tell(&format!("{hits} hits, {misses} misses"));
    assert!(hits > 100.0, "{hits} hits");
    daemon.finish();
}

/// The same with real guests.
#[test]
fn ten_real_lives_leave_as_many_taps_processes_descriptors_files_and_rows() {
    let daemon = Daemon::start();
    let once = ["run", "--rm", "--memory", "128m", IMAGE, "true"];
    daemon.ok(once);
    let before = daemon.inventory();
    for _ in 0..10 {
        daemon.ok(once);
    }
    daemon.as_before(&before, "ten real lives");
    assert_eq!(claims(&daemon), (10.0, 1.0));
    daemon.finish();
}
