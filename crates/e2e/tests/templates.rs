//! Templates: VMs that are restored are VMs of their own, damage is found and mended, and nothing is left of one that was
//! being made.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use offshoot_e2e::{Daemon, IMAGE, flip_byte, tell, wait_until};
use serde_json::Value;

/// Small guests: many of them run at once.
const MEMORY: &str = "128m";

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn run(daemon: &Daemon, name: &str, boot: &str) {
    daemon.ok([
        "run", "-d", "--name", name, "--memory", MEMORY, "--boot", boot, IMAGE, "sleep", "infinity",
    ]);
}

/// `cold` or `template`, and the reasons.
fn booted(daemon: &Daemon, vm: &str) -> (String, String) {
    let boot = &daemon.inspect(vm)["boot"];
    let reasons: Vec<_> = boot["reasons"]
        .as_array()
        .expect("reasons")
        .iter()
        .map(text)
        .collect();
    (text(&boot["chosen"]), reasons.join("; "))
}

fn templates(daemon: &Daemon) -> Vec<Value> {
    let listed = daemon.ok(["template", "ls", "--output", "json"]);
    serde_json::from_str::<Vec<Value>>(&listed).expect("a list")
}

/// The folder of the only template.
fn folder(daemon: &Daemon) -> PathBuf {
    let all = templates(daemon);
    assert_eq!(all.len(), 1, "{all:?}");
    daemon.data().join("templates").join(text(&all[0]["id"]))
}

/// What tells a VM from every other, a line each.
const WHO: &str = "cat /sys/class/net/eth0/address; hostname; \
     cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; head -c 1048576 /dev/urandom | sha256sum; \
     cat /proc/net/fib_trie | grep -o '10[.]87[.][0-9]*[.][0-9]*' | sort -u | head -5";

/// Mac, host name, machine id, boot id, a digest of 1 MiB of random bytes, addresses.
fn who(daemon: &Daemon, vm: &str) -> Vec<String> {
    let said = daemon.ok(["exec", vm, "sh", "-c", WHO]);
    said.lines().map(str::to_owned).collect()
}

/// How wrong a guest's clock is, at most.
fn clock_error(daemon: &Daemon, vm: &str) -> Duration {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    // The shortest question of several: what a round trip takes is not the clock's fault.
    let asked = (0..5).map(|_| {
        let before = now();
        let said = daemon.ok(["exec", vm, "date", "+%s.%N"]);
        let after = now();
        let (seconds, nanos) = said.trim().split_once('.').expect("seconds and nanoseconds");
        let there = Duration::new(
            seconds.parse().expect("seconds"),
            nanos.parse().expect("nanoseconds"),
        );
        // It looked at its clock at some time between.
        before.saturating_sub(there).max(there.saturating_sub(after))
    });
    asked.min().expect("five times")
}

#[test]
fn two_vms_of_one_template_are_two_vms() {
    let daemon = Daemon::start();
    run(&daemon, "one", "template");
    run(&daemon, "two", "auto");
    for vm in ["one", "two"] {
        let (chosen, reasons) = booted(&daemon, vm);
        assert_eq!(chosen, "template", "{reasons}");
    }
    assert_eq!(templates(&daemon)[0]["vms"], 2);
    let (one, two) = (who(&daemon, "one"), who(&daemon, "two"));
    assert_eq!(one.len(), two.len());
    for (line, (first, second)) in one.iter().zip(&two).enumerate() {
        // The network's own addresses are among the last lines; the VMs' are not.
        assert!(line > 4 || first != second, "line {line}: {first}");
    }
    let host_key = |vm: &str| daemon.ok(["ssh-known-hosts", vm]);
    assert_ne!(host_key("one"), host_key("two"));
    for vm in ["one", "two"] {
        let wrong = clock_error(&daemon, vm);
        assert!(wrong < Duration::from_millis(100), "{vm}: {wrong:?}");
        // Its own, and whole, disks.
        let mounts = daemon.ok(["exec", vm, "cat", "/proc/mounts"]);
        for mount in ["overlay / overlay rw", " /root ext4 rw"] {
            assert!(mounts.contains(mount), "{mounts}");
        }
    }
    // Nothing that one writes is seen by the other, wherever it writes.
    for place in ["/root", "/etc", "/tmp", "/dev/shm", "/run"] {
        let path = format!("{place}/mine");
        daemon.ok(["exec", "one", "sh", "-c", &format!("echo words > {path}; sync")]);
        assert!(
            !daemon.cli(["exec", "two", "cat", &path]).run().status.success(),
            "{path}"
        );
    }
    // A third one sees nothing of it either.
    run(&daemon, "three", "template");
    assert!(
        !daemon
            .cli(["exec", "three", "cat", "/root/mine"])
            .run()
            .status
            .success()
    );
    // What it wrote is there when it boots again, however it boots.
    daemon.ok(["restart", "one"]);
    assert_eq!(booted(&daemon, "one").0, "template");
    assert_eq!(
        daemon.ok(["exec", "one", "cat", "/root/mine", "/etc/mine"]),
        "words\nwords"
    );
    let again = who(&daemon, "one");
    assert_eq!(again[2], one[2], "the machine id is the VM's for life");
    assert_ne!(again[3], one[3], "a boot id is of one boot");
    daemon.finish();
}

#[test]
fn a_vmm_cannot_write_to_a_template() {
    let daemon = Daemon::start();
    run(&daemon, "web", "template");
    let folder = folder(&daemon);
    let before = ["memory", "state", "template.json"].map(|name| offshoot_e2e::sha256(&folder.join(name)));
    let pid = daemon.inspect("web")["pid"].as_u64().expect("a pid");
    // Whoever takes the VMM over is its user, with its descriptors.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let uid: u32 = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().next()?.parse().ok())
        .expect("a user");
    assert_ne!(uid, 0);
    // The one that it keeps; what it read its devices from is closed by now, and sealed like this one.
    {
        let place = format!("/proc/{pid}/fd/12");
        let link = std::fs::read_link(&place).expect("the descriptor");
        assert!(link.to_string_lossy().starts_with("/memfd:offshoot-"), "{link:?}");
        // Even root cannot: the seals are the file's.
        let script =
            format!("printf x | dd of={place} conv=notrunc bs=1 2>&1; truncate -s 1 {place} 2>&1; true");
        let said = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .expect("sh");
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.matches("Operation not permitted").count() >= 2, "{said}");
    }
    for name in ["memory", "state", "template.json"] {
        let path = folder.join(name);
        let script = format!(
            "exec 2>&1; cat {0} >/dev/null; echo x >> {0}; rm -f {0}; true",
            path.display()
        );
        let said = std::process::Command::new("setpriv")
            .args([
                &format!("--reuid={uid}"),
                &format!("--regid={uid}"),
                "--clear-groups",
                "sh",
                "-c",
                &script,
            ])
            .output()
            .expect("setpriv");
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("Permission denied"), "{said}");
    }
    let after = ["memory", "state", "template.json"].map(|name| offshoot_e2e::sha256(&folder.join(name)));
    assert_eq!(before, after);
    daemon.finish();
}

/// Damages a template, starts a VM, and looks that it booted its kernel, that the reason is told, and that the template is
/// made again.
fn damaged(damage: impl FnOnce(&Path), reason: &str) {
    let daemon = Daemon::start_with("background_templates = true");
    run(&daemon, "first", "template");
    assert_eq!(booted(&daemon, "first").0, "template");
    damage(&folder(&daemon));
    run(&daemon, "second", "auto");
    let (chosen, reasons) = booted(&daemon, "second");
    assert_eq!(chosen, "cold", "{reasons}");
    assert!(reasons.contains(reason), "{reasons}");
    wait_until("the template to be made again", || {
        templates(&daemon)
            .iter()
            .any(|template| template["problem"].is_null())
    });
    run(&daemon, "third", "auto");
    assert_eq!(booted(&daemon, "third").0, "template");
    // The first one runs on in memory that nothing can damage.
    daemon.ok(["exec", "first", "true"]);
    daemon.finish();
}

#[test]
fn a_truncated_memory_is_found() {
    damaged(
        |folder| {
            let memory = std::fs::File::options()
                .write(true)
                .open(folder.join("memory"))
                .unwrap();
            memory.set_len(64 << 20).unwrap();
        },
        "the memory has 67108864 bytes instead of 134217728",
    );
}

#[test]
fn a_flipped_byte_in_the_state_is_found() {
    damaged(
        |folder| {
            flip_byte(&folder.join("state"), 1000);
        },
        "the state is not what was saved",
    );
}

#[test]
fn a_flipped_byte_in_the_memory_is_found() {
    damaged(
        |folder| {
            flip_byte(&folder.join("memory"), 0x10_0000);
        },
        "the memory is not what was saved",
    );
}

#[test]
fn a_manifest_that_is_none_is_found() {
    damaged(
        |folder| std::fs::write(folder.join("template.json"), "{").unwrap(),
        "its template.json cannot be read",
    );
}

#[test]
fn another_vmm_gets_a_template_of_its_own() {
    // The real one by another name, so that it can be replaced.
    let folder = tempfile::Builder::new()
        .prefix("offshoot-qemu-")
        .tempdir()
        .unwrap();
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    // It looks for its modules and firmware beside the folder that it lies in.
    let bin = folder.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for name in ["lib", "share"] {
        std::os::unix::fs::symlink(Path::new("/usr").join(name), folder.path().join(name)).unwrap();
    }
    open(folder.path());
    open(&bin);
    let qemu = bin.join("qemu");
    std::fs::copy("/usr/bin/qemu-system-x86_64", &qemu).unwrap();
    open(&qemu);
    let mut daemon = Daemon::start_with(&format!("qemu = {:?}", qemu.display().to_string()));
    run(&daemon, "first", "template");
    daemon.ok(["rm", "-f", "first"]);
    daemon.kill();
    // An upgrade that kept the version.
    std::fs::remove_file(&qemu).unwrap();
    std::fs::copy("/usr/bin/qemu-system-x86_64", &qemu).unwrap();
    open(&qemu);
    daemon.start_again();
    let useless = || {
        let report = daemon.get_json("/v1/system/doctor");
        let findings = report["findings"].as_array().expect("findings");
        findings.iter().any(|found| found["id"] == "template-useless")
    };
    assert!(useless(), "doctor tells of what the other program saved");
    assert!(
        templates(&daemon)[0]["problem"]
            .as_str()
            .is_some_and(|problem| problem.contains("another build of qemu")),
        "and so does the list"
    );
    run(&daemon, "second", "auto");
    let (chosen, reasons) = booted(&daemon, "second");
    assert_eq!(chosen, "cold", "{reasons}");
    assert!(reasons.contains("no template of its kind yet"), "{reasons}");
    run(&daemon, "third", "template");
    assert_eq!(templates(&daemon).len(), 2);
    let unused: BTreeSet<_> = templates(&daemon)
        .iter()
        .filter(|template| template["vms"] == 0)
        .map(|template| text(&template["id"]))
        .collect();
    // What no VM runs from goes with `prune`, once it is old enough.
    daemon.ok(["prune", "--force", "--grace", "0s"]);
    assert!(!useless());
    let left: Vec<_> = templates(&daemon)
        .iter()
        .map(|template| text(&template["id"]))
        .collect();
    assert_eq!(left.len(), 1);
    assert!(!unused.contains(&left[0]));
    daemon.ok(["template", "rm", &left[0]]);
    daemon.ok(["exec", "third", "true"]);
    daemon.finish();
}

#[test]
fn what_cannot_be_restored_is_refused_or_boots_and_says_why() {
    let daemon = Daemon::start();
    let shared = daemon.root().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mount = format!("{}:/mnt", shared.display());
    let refused = daemon
        .cli([
            "run", "-d", "--boot", "template", "-v", &mount, IMAGE, "sleep", "1",
        ])
        .run();
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("shared folders") && said.contains("hint:"),
        "{said}"
    );
    daemon.ok([
        "run", "-d", "--name", "web", "-v", &mount, IMAGE, "sleep", "infinity",
    ]);
    let (chosen, reasons) = booted(&daemon, "web");
    assert_eq!(chosen, "cold");
    assert!(reasons.contains("shared folders"), "{reasons}");
    daemon.ok([
        "run", "-d", "--name", "cold", "--boot", "cold", IMAGE, "sleep", "infinity",
    ]);
    assert_eq!(booted(&daemon, "cold"), ("cold".into(), "asked for".into()));
    daemon.finish();
}

#[test]
fn a_template_is_made_by_itself_after_the_first_boot() {
    let daemon = Daemon::start_with("background_templates = true");
    run(&daemon, "first", "auto");
    assert_eq!(booted(&daemon, "first").0, "cold");
    wait_until("a template", || !templates(&daemon).is_empty());
    run(&daemon, "second", "auto");
    assert_eq!(booted(&daemon, "second").0, "template");
    let df: Value = serde_json::from_str(&daemon.ok(["df", "--output", "json"])).unwrap();
    assert_eq!(df["templates"][0]["vms"], 1);
    for what in ["bytes", "memory"] {
        assert!(df["templates"][0][what].as_u64().unwrap() > 10 << 20, "{df}");
    }
    daemon.finish();
}

#[test]
fn the_roots_and_networks_that_can_be_restored() {
    let daemon = Daemon::start();
    for (name, words) in [
        ("pmem", &["--root", "pmem"][..]),
        ("alone", &["--network", "none"]),
        ("large", &["--disk", "20g", "--work", "3g"]),
    ] {
        for n in 0..2 {
            let name = format!("{name}-{n}");
            let mut all = vec![
                "run", "-d", "--name", &name, "--memory", MEMORY, "--boot", "template",
            ];
            all.extend(words);
            all.extend([IMAGE, "sleep", "infinity"]);
            daemon.ok(&all);
            assert_eq!(booted(&daemon, &name).0, "template");
            let size = daemon.ok(["exec", &name, "sh", "-c", "df -k --output=size / /root | tail -2"]);
            let gib: Vec<u64> = size
                .lines()
                .map(|line| line.trim().parse::<u64>().unwrap() >> 20)
                .collect();
            let expected = if words.contains(&"20g") { [19, 2] } else { [9, 9] };
            assert_eq!(gib, expected, "{name}");
            // Read, not only mounted.
            daemon.ok(["exec", &name, "sh", "-c", "sha256sum /usr/bin/* >/dev/null"]);
        }
    }
    daemon.finish();
}

#[test]
fn fifty_clones_made_ten_at_a_time_are_all_different() {
    let daemon = Daemon::start();
    run(&daemon, "vm-0", "template");
    std::thread::scope(|scope| {
        for lane in 0..10 {
            let daemon = &daemon;
            scope.spawn(move || {
                for n in (lane..50).step_by(10).filter(|n| *n > 0) {
                    run(daemon, &format!("vm-{n}"), "template");
                }
            });
        }
    });
    // By line: of each thing that tells VMs apart, all there are.
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); 5];
    for n in 0..50 {
        let name = format!("vm-{n}");
        assert_eq!(booted(&daemon, &name).0, "template", "{name}");
        for (line, seen) in who(&daemon, &name).into_iter().zip(&mut seen) {
            assert!(seen.insert(line.clone()), "{name} has {line}, too");
        }
    }
    daemon.finish();
}

/// The daemon dies on both sides of each of these stages of making a template.
fn nothing_is_left(stages: &[&str]) {
    let mut daemon = Daemon::start();
    for stage in stages {
        for when in ["before", "after"] {
            let point = format!("template/{stage}/{when}");
            daemon.kill();
            daemon.start_again_with(&[("OFFSHOOT_FAIL_POINT", &point)]);
            let asked = daemon
                .cli([
                    "run", "-d", "--name", "web", "--memory", MEMORY, "--boot", "template", IMAGE, "sleep",
                    "1000",
                ])
                .run();
            assert!(!asked.status.success(), "{point}: the daemon is gone");
            daemon.wait_ended();
            daemon.start_again();
            wait_until("the VM's start to be undone", || {
                daemon.state("web") != "starting" && daemon.vmms().is_empty()
            });
            // What it found it removed; a template is there whole or not at all.
            let whole = templates(&daemon);
            let published = point == "template/publish/after";
            assert_eq!(whole.len(), usize::from(published), "{point}: {whole:?}");
            assert!(
                whole.iter().all(|template| template["problem"].is_null()),
                "{whole:?}"
            );
            daemon.ok(["start", "web"]);
            assert_eq!(booted(&daemon, "web").0, "template");
            daemon.ok(["rm", "-f", "web"]);
            for template in templates(&daemon) {
                daemon.ok(["template", "rm", &text(&template["id"])]);
            }
            tell(&point);
        }
    }
    daemon.finish();
}

#[test]
fn nothing_is_left_of_a_template_that_was_being_made() {
    nothing_is_left(&["boot", "save", "publish"]);
}

#[test]
#[ignore = "a minute more of the same; `make soak` runs it"]
fn nothing_is_left_of_a_template_whichever_stage_it_was_in() {
    nothing_is_left(&[
        "root.prepare",
        "overlay.prepare",
        "vmm.prepare",
        "rehearse",
        "vmm.stop",
    ]);
}
