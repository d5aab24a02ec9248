//! Many VMs at once: all of them are listed, each in its true state.

use std::collections::BTreeMap;

use offshoot_e2e::{Daemon, IMAGE};
use serde_json::{Value, json};

const FAKES: usize = 200;
const REAL: usize = 20;
/// Emulated guests take a core each while they boot.
const AT_ONCE: usize = 2;
const CLIENTS: usize = 8;

/// Creates, and for most of them starts, fakes.
fn fake(daemon: &Daemon, n: usize) {
    let body = json!({"name": format!("fake-{n}"), "image": IMAGE, "cmd": ["sleep", "infinity"],
        "memory": Daemon::FAKE_MEMORY_MIB << 20});
    let (status, answer) = daemon.post("/v1/vms", &body);
    assert_eq!(status, 201, "{answer}");
    let path = |verb: &str| format!("/v1/vms/fake-{n}/{verb}");
    let verbs: &[&str] = match fate(n) {
        "created" => &[],
        "running" => &["start"],
        "paused" => &["start", "pause"],
        _ => &["start", "stop"],
    };
    for verb in verbs {
        let (status, answer) = daemon.ask("POST", &path(verb), None);
        assert_eq!(status, 200, "{verb}: {answer}");
    }
}

/// Where the `n`th fake ends up.
fn fate(n: usize) -> &'static str {
    match n % 10 {
        0 => "created",
        1 => "paused",
        2 => "stopped",
        _ => "running",
    }
}

fn states(vms: &Value) -> BTreeMap<String, String> {
    let text = |vm: &Value, key: &str| vm[key].as_str().expect("a text").to_owned();
    vms.as_array()
        .expect("a list")
        .iter()
        .map(|vm| (text(vm, "name"), text(vm, "state")))
        .collect()
}

#[test]
fn two_hundred_records_and_twenty_real_vms_are_listed_as_they_are() {
    let mut daemon = Daemon::start_fake_beside_qemu("");
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let daemon = &daemon;
            scope.spawn(move || (client..FAKES).step_by(CLIENTS).for_each(|n| fake(daemon, n)));
        }
    });
    let real: Vec<String> = (0..REAL).map(|n| format!("real-{n}")).collect();
    let runs: Vec<Vec<&str>> = real
        .iter()
        .map(|name| {
            vec![
                "--name",
                name.as_str(),
                "--memory",
                "256m",
                IMAGE,
                "sleep",
                "100000",
            ]
        })
        .collect();
    for few in runs.chunks(AT_ONCE) {
        daemon.start_all(few);
    }

    let mut expected: BTreeMap<_, _> = (0..FAKES)
        .map(|n| (format!("fake-{n}"), fate(n).to_owned()))
        .collect();
    expected.extend(real.iter().map(|name| (name.clone(), "running".to_owned())));
    assert_eq!(states(&daemon.get_json("/v1/vms?all=true")), expected);
    let running: BTreeMap<_, _> = expected
        .iter()
        .filter(|(_, state)| matches!(state.as_str(), "running" | "paused"))
        .map(|(name, state)| (name.clone(), state.clone()))
        .collect();
    assert_eq!(states(&daemon.get_json("/v1/vms")), running);
    assert_eq!(daemon.ok(["ps", "-aq"]).lines().count(), FAKES + REAL);
    assert_eq!(daemon.disagreements(), [""; 0]);
    // The real ones are real.
    assert_eq!(
        daemon.ok(["exec", "real-7", "cat", "/proc/sys/kernel/hostname"]),
        "real-7"
    );

    // Another daemon finds every one of them again.
    daemon.kill();
    daemon.start_again();
    daemon.wait_until_all_agree();
    assert_eq!(states(&daemon.get_json("/v1/vms?all=true")), expected);
    daemon.finish();
}
