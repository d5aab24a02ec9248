//! A VM is like any other of its image and shape, however it came to be: the same questions get the same answers, but for what
//! must differ.

use offshoot_e2e::{DIFFERS, Daemon, IMAGE, MAY_DIFFER, Probe, tell, wait_until};

/// How many questions there are at least.
const QUESTIONS: usize = 30;
/// The shape of VMs that can have any.
const SHAPE: [&str; 6] = ["--memory", "384m", "--cpus", "2", "--work", "20g"];

/// Starts a VM in one way, and asks it.
fn vm(daemon: &Daemon, name: &str, how: &[&str]) -> Probe {
    vm_of_shape(daemon, name, &SHAPE, how)
}

fn vm_of_shape(daemon: &Daemon, name: &str, shape: &[&str], how: &[&str]) -> Probe {
    daemon.ok([
        &["run", "-d", "--name", name],
        shape,
        how,
        &[IMAGE, "sleep", "100000"],
    ]
    .concat());
    daemon.probe(name)
}

fn compare(one: &Probe, two: &Probe) {
    assert!(one.len() >= QUESTIONS, "only {} questions", one.len());
    for name in DIFFERS.iter().chain(MAY_DIFFER.iter().map(|(name, _)| name)) {
        assert!(!one.answer(name).is_empty(), "nobody asks for {name}");
    }
    let mut wrong = [one.complaints(), two.complaints()].concat();
    wrong.extend(one.differences(two));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    tell(&format!("{} questions, answered alike", one.len()));
}

#[test]
fn vms_that_booted_are_alike_and_so_is_one_from_a_template() {
    let daemon = Daemon::start();
    let cold = ["--boot", "cold"];
    let (one, two) = (vm(&daemon, "alike-one", &cold), vm(&daemon, "alike-two", &cold));
    let restored = vm(&daemon, "alike-new", &["--boot", "template"]);
    for (name, how) in [("alike-one", "cold"), ("alike-new", "template")] {
        let boot = &daemon.inspect(name)["boot"];
        assert_eq!(boot["chosen"], how, "{boot:#}");
    }
    compare(&one, &two);
    compare(&one, &restored);
    daemon.finish();
}

#[test]
fn a_vm_in_a_warm_slot_is_like_one_that_booted() {
    let daemon = Daemon::start();
    // Slots have the default shape; disks of a VM that takes one may be larger.
    let shape = ["--disk", "20g", "--work", "20g"];
    let booted = vm_of_shape(&daemon, "alike-cold", &shape, &["--boot", "cold"]);
    daemon.ok(["image", "warm", IMAGE, "1"]);
    wait_until("a warm slot", || {
        daemon.get_json("/v1/system/df")["slots"]["count"] == 1
    });
    let warm = vm_of_shape(&daemon, "alike-made", &shape, &[]);
    let reason = daemon.inspect("alike-made")["boot"]["reasons"][0].to_string();
    assert!(reason.contains("warm slot"), "{reason}");
    compare(&booted, &warm);
    daemon.ok(["image", "warm", IMAGE, "0"]);
    daemon.finish();
}
