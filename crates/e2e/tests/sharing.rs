//! Folders of the host in guests: right on both sides, closed where they should be, and supervised.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use offshoot_e2e::{Daemon, IMAGE, Process, names, signal, wait_until};
use rustix::process::Signal;

const MEMORY: [&str; 2] = ["--memory", "256m"];

/// A folder of the host that everybody in a guest may write to, with one file named `who` that says its name.
fn folder(daemon: &Daemon, name: &str) -> PathBuf {
    let path = daemon.root().join("shares").join(name);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::write(path.join("who"), name).unwrap();
    path
}

/// `-v HOST:GUEST`.
fn volume(source: &Path, target: &str) -> String {
    format!("{}:{target}", source.display())
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `run -d` of VMs, each with a kind of root and volumes.
fn start(daemon: &Daemon, vms: &[(&str, &str, Vec<String>)]) {
    let runs: Vec<Vec<&str>> = vms
        .iter()
        .map(|(name, root, volumes)| {
            let mut run = vec!["--name", name, "--root", root];
            run.extend(MEMORY);
            run.extend(volumes.iter().flat_map(|volume| ["-v", volume.as_str()]));
            run.extend([IMAGE, "sleep", "1000"]);
            run
        })
        .collect();
    daemon.start_all(&runs);
}

/// Why the VM works only in part, as `inspect` tells it.
fn degraded(daemon: &Daemon, vm: &str) -> Vec<String> {
    let details = daemon.inspect(vm);
    let reasons = details["degraded"].as_array().expect("`degraded` is a list");
    reasons
        .iter()
        .map(|reason| reason.as_str().unwrap().to_owned())
        .collect()
}

/// The one process of a share that the guest's requests go to.
fn innermost(daemon: &Daemon, source: &Path) -> Process {
    let mut serving = daemon.virtiofsds_of(source);
    serving
        .pop()
        .unwrap_or_else(|| panic!("nobody serves {}", source.display()))
}

#[test]
fn folders_are_shared_beside_every_root() {
    let daemon = Daemon::start();
    let (common, closed) = (folder(&daemon, "common"), folder(&daemon, "closed"));
    let owns = ["a", "b", "c", "d"].map(|vm| folder(&daemon, vm));
    let owned = common.join("owned");
    std::fs::write(&owned, "owned").unwrap();
    chown(&owned, Some(1234), Some(5678)).unwrap();
    std::fs::set_permissions(&owned, PermissionsExt::from_mode(0o640)).unwrap();

    let three = |own: &Path| {
        vec![
            volume(own, "/own"),
            volume(&common, "/srv/made/on/the/way"),
            volume(&closed, "/closed:ro"),
        ]
    };
    start(
        &daemon,
        &[
            ("a", "virtiofs", three(&owns[0])),
            ("b", "pmem", three(&owns[1])),
            ("c", "block", vec![volume(&owns[2], "/own")]),
            ("d", "copy", vec![volume(&owns[3], "/own")]),
        ],
    );
    for (vm, own) in ["a", "b", "c", "d"].into_iter().zip(&owns) {
        assert_eq!(daemon.ok(["exec", vm, "cat", "/own/who"]), vm);
        daemon.ok([
            "exec",
            vm,
            "sh",
            "-c",
            &format!("echo from {vm} >/own/back; mkdir /own/sub; rm /own/who"),
        ]);
        assert_eq!(read(&own.join("back")), format!("from {vm}\n"));
        assert_eq!(names(own), ["back", "sub"]);
    }
    let shared = "/srv/made/on/the/way";
    for vm in ["a", "b"] {
        // Owners are the host's, in both directions.
        let owner = ["stat", "-c", "%u:%g %a"];
        assert_eq!(
            daemon.ok([&["exec", vm], &owner[..], &[&format!("{shared}/owned")]].concat()),
            "1234:5678 640"
        );
        daemon.ok([
            "exec",
            "-u",
            "33:33",
            vm,
            "sh",
            "-c",
            &format!("echo {vm} >{shared}/by-{vm}"),
        ]);
        let by = std::fs::metadata(common.join(format!("by-{vm}"))).unwrap();
        assert_eq!((by.uid(), by.gid()), (33, 33));
        daemon
            .cli(["exec", "-u", "33:33", vm, "cat", &format!("{shared}/owned")])
            .fails(1);

        // Root itself, who can tell its own kernel what it wants, cannot write where the host says no.
        for attempt in [
            "touch /closed/new",
            "dd if=/dev/null of=/closed/who",
            "rm -f /closed/who",
            "chmod 700 /closed",
            "mount -o remount,rw /closed; touch /closed/new",
        ] {
            let error = daemon.cli(["exec", vm, "sh", "-c", attempt]).fails(1);
            assert!(
                error.contains("Read-only file system"),
                "{vm}: {attempt}: {error}"
            );
        }
        assert_eq!(daemon.ok(["exec", vm, "cat", "/closed/who"]), "closed");
    }
    assert_eq!(names(&closed), ["who"]);
    assert_eq!(read(&closed.join("who")), "closed");
    daemon.ok(["exec", "a", "chown", "7:8", &format!("{shared}/by-a")]);
    let by = std::fs::metadata(common.join("by-a")).unwrap();
    assert_eq!((by.uid(), by.gid()), (7, 8));
    // What one wrote the other reads, and what the host changes meanwhile as well.
    assert_eq!(daemon.ok(["exec", "b", "cat", &format!("{shared}/by-a")]), "a");
    std::fs::write(common.join("late"), "late").unwrap();
    for vm in ["a", "b"] {
        assert_eq!(daemon.ok(["exec", vm, "cat", &format!("{shared}/late")]), "late");
    }
    // A shared root makes one mount table with the others.
    let roots = daemon.virtiofsds_of(&daemon.data().join("bases"));
    assert!(!roots.is_empty(), "nobody serves the shared root");
    assert_eq!(degraded(&daemon, "a"), [""; 0]);
    daemon.finish();
}

#[test]
fn a_share_that_dies_costs_no_more_than_itself() {
    let daemon = Daemon::start();
    let (gone, stays) = (folder(&daemon, "gone"), folder(&daemon, "stays"));
    start(
        &daemon,
        &[(
            "vm",
            "auto",
            vec![volume(&gone, "/gone"), volume(&stays, "/stays:ro")],
        )],
    );
    let pid = daemon.inspect("vm")["pid"].clone();
    assert_eq!(degraded(&daemon, "vm"), [""; 0]);
    signal(innermost(&daemon, &gone).pid, Signal::KILL);
    wait_until("the dead virtiofsd to be noticed", || {
        !degraded(&daemon, "vm").is_empty()
    });
    let reasons = degraded(&daemon, "vm");
    assert!(reasons.len() == 1 && reasons[0].contains("/gone"), "{reasons:?}");
    let table = daemon.ok(["ps"]);
    assert!(table.contains("(degraded)"), "{table}");
    let list: serde_json::Value = serde_json::from_str(&daemon.ok(["ps", "--output", "json"])).unwrap();
    assert_eq!(list[0]["degraded"].as_array().map(Vec::len), Some(1), "{list}");
    // The VM and the other share go on.
    assert_eq!(daemon.state("vm"), "running");
    assert_eq!(daemon.inspect("vm")["pid"], pid);
    assert_eq!(daemon.ok(["exec", "vm", "cat", "/stays/who"]), "stays");
    assert_eq!(daemon.ok(["exec", "vm", "echo", "alive"]), "alive");
    wait_until("its sandbox to end", || daemon.virtiofsds_of(&gone).is_empty());

    // A new start brings it back.
    daemon.ok(["stop", "-t", "2", "vm"]);
    assert_eq!(daemon.virtiofsds(), [], "a VM that does not run has no helpers");
    daemon.ok(["start", "vm"]);
    assert_eq!(degraded(&daemon, "vm"), [""; 0]);
    assert_eq!(
        daemon.ok(["exec", "vm", "cat", "/gone/who", "/stays/who"]),
        "gonestays"
    );

    // And a VM in such a state is removed like any other.
    signal(innermost(&daemon, &stays).pid, Signal::KILL);
    wait_until("the dead virtiofsd to be noticed", || {
        !degraded(&daemon, "vm").is_empty()
    });
    daemon.ok(["rm", "-f", "vm"]);
    assert_eq!(daemon.virtiofsds(), [], "a virtiofsd outlived its VM");
    daemon.finish();
}

#[test]
fn shares_outlive_a_killed_daemon() {
    let mut daemon = Daemon::start();
    let (kept, other) = (folder(&daemon, "kept"), folder(&daemon, "other"));
    start(
        &daemon,
        &[
            ("root", "virtiofs", vec![volume(&kept, "/kept")]),
            ("plain", "auto", vec![volume(&other, "/other")]),
        ],
    );
    let serving = |daemon: &Daemon| -> Vec<i32> {
        let mut pids: Vec<_> = daemon.virtiofsds().iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        pids
    };
    let before = serving(&daemon);
    daemon.kill();
    assert_eq!(serving(&daemon), before, "a virtiofsd died with the daemon");
    daemon.start_again();
    for (vm, target, source) in [("root", "/kept", &kept), ("plain", "/other", &other)] {
        wait_until("the agent to be found again", || {
            daemon.cli(["exec", vm, "true"]).run().status.success()
        });
        daemon.ok(["exec", vm, "sh", "-c", &format!("echo again >{target}/again")]);
        assert_eq!(read(&source.join("again")), "again\n");
        assert_eq!(degraded(&daemon, vm), [""; 0]);
    }
    assert_eq!(serving(&daemon), before, "the same processes");

    // They are still watched: this time the outermost process dies, sandbox and all.
    let dies = |daemon: &Daemon, source: &Path| signal(daemon.virtiofsds_of(source)[0].pid, Signal::KILL);
    let told = |daemon: &Daemon, vm: &str, target: &str| {
        wait_until("the dead virtiofsd to be noticed", || {
            !degraded(daemon, vm).is_empty()
        });
        let reasons = degraded(daemon, vm);
        assert!(reasons.len() == 1 && reasons[0].contains(target), "{reasons:?}");
        assert_eq!(daemon.ok(["exec", vm, "cat", "/etc/hostname"]), vm);
    };
    dies(&daemon, &kept);
    told(&daemon, "root", "/kept");
    wait_until("its sandbox to end", || daemon.virtiofsds_of(&kept).is_empty());
    assert_eq!(degraded(&daemon, "plain"), [""; 0]);
    // What dies while nobody watches is noticed afterwards, and what was known is not forgotten.
    daemon.kill();
    dies(&daemon, &other);
    daemon.start_again();
    for (vm, target) in [("root", "/kept"), ("plain", "/other")] {
        wait_until("the agent to be found again", || {
            daemon.cli(["exec", vm, "true"]).run().status.success()
        });
        told(&daemon, vm, target);
    }
    daemon.ok(["rm", "-f", "root", "plain"]);
    assert_eq!(daemon.virtiofsds(), [], "a virtiofsd outlived its VM");
    daemon.finish();
}

#[test]
fn odd_paths_are_shared_as_they_are() {
    let daemon = Daemon::start();
    let odd = [
        "two words",
        "com,ma",
        "equals=sign",
        "back\\slash",
        "-leading-dash",
        "quo\"te",
        "apos'trophe",
    ];
    let volumes = odd.iter().enumerate().map(|(n, name)| {
        let source = folder(&daemon, name);
        volume(&source, &format!("/odd/{n}"))
    });
    let inner = folder(&daemon, "plain");
    let target = "/odd/a target, with=all \"of' it\\";
    let volumes: Vec<_> = volumes.chain([volume(&inner, target)]).collect();
    start(&daemon, &[("vm", "auto", volumes)]);
    for (n, name) in odd.iter().enumerate() {
        assert_eq!(daemon.ok(["exec", "vm", "cat", &format!("/odd/{n}/who")]), *name);
        daemon.ok(["exec", "vm", "sh", "-c", &format!("echo {n} >/odd/{n}/back")]);
        assert_eq!(
            read(&daemon.root().join("shares").join(name).join("back")),
            format!("{n}\n")
        );
    }
    assert_eq!(
        daemon.ok(["exec", "vm", "cat", &format!("{target}/who")]),
        "plain"
    );
    daemon.finish();
}
