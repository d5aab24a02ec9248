//! Work disks come from seeds: shared blocks where the host can, thin everywhere, grown in the guest; and bases that an earlier
//! version made without a seed serve until they are made current.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use offshoot_e2e::{Daemon, IMAGE, allocated, names, sha256, text};
use serde_json::Value;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Makes the image's base what the first version would have made of it: its id, its `base.json`, no work seed. Gives the id.
fn age(daemon: &Daemon) -> String {
    let bases = daemon.data().join("bases");
    let current = bases.join(&names(&bases)[0]);
    let path = current.join("base.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let variant = "root.erofs=1 overlay-seed.ext4=1";
    json["format"] = 1.into();
    json["variant"] = variant.into();
    let fields = json.as_object_mut().unwrap();
    fields.remove("work_seed").unwrap();
    let overlay = fields["overlay_seed"].as_object_mut().unwrap();
    overlay.retain(|name, _| ["size", "writer"].contains(&name.as_str()));
    let image = fields["image"].as_str().unwrap();
    let key = daemon.root().join("key");
    std::fs::write(&key, format!("offshoot base\n{image}\n{variant}\n")).unwrap();
    let id = sha256(&key)[..32].to_owned();
    // The file is the golden image's, too: another one takes its place.
    std::fs::set_permissions(&current, Permissions::from_mode(0o755)).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, json.to_string()).unwrap();
    std::fs::remove_file(current.join("work-seed.ext4")).unwrap();
    std::fs::rename(&current, bases.join(&id)).unwrap();
    id
}

fn findings(daemon: &Daemon, id: &str) -> Vec<Value> {
    let output = daemon.cli(["doctor", "--output", "json"]).run();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().iter();
    findings.filter(|found| found["id"] == id).cloned().collect()
}

/// What a guest sees of its work disk: what is in it, its owner and mode, and how large it is.
const LOOK: &str = "stat -c '%a %u:%g' /root; ls -lAn /root | sed 1d; cat /root/.profile; df -B1 --output=size /root | tail -1";

fn size_of_root(look: &str) -> u64 {
    look.lines().next_back().unwrap().trim().parse().unwrap()
}

/// What is written where.
const WARNS: &str = "warning: an earlier version prepared `debian:bookworm`";
const BUILDS: &str = "building a disk, because the base was made by an earlier version";
const FOUND: &str = "an earlier version made this base, without a work seed";

#[test]
fn a_base_from_before_serves_and_is_made_current_beside_it() {
    let mut daemon = Daemon::start();
    daemon.kill();
    let old = age(&daemon);
    daemon.start_again();
    let bases = daemon.data().join("bases");

    // It is told of by everybody.
    let missing = findings(&daemon, "seed-missing");
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert_eq!(missing[0]["severity"], "warning");
    assert_eq!(missing[0]["hint"], "offshoot image prepare --all");
    assert_eq!(missing[0]["fix"], "prepare-bases");
    let listed: Value = serde_json::from_str(&daemon.ok(["image", "ls", "--output", "json"])).unwrap();
    assert_eq!(
        (&listed[0]["prepared"], &listed[0]["seeds"]),
        (&true.into(), &"missing".into())
    );
    assert!(daemon.ok(["image", "ls"]).contains("(old)"));
    let inspected: Value = serde_json::from_str(&daemon.ok(["image", "inspect", IMAGE])).unwrap();
    assert_eq!(inspected["base"]["id"], old.as_str());
    assert_eq!(inspected["base"]["work_seed"], Value::Null);

    // VMs run from it, with a word, and nothing is prepared for them.
    let run = |name: &str| {
        let arguments = [
            "run", "-d", "--name", name, "--memory", "256m", "--work", "20g", IMAGE, "sleep", "100000",
        ];
        let output = daemon.cli(arguments).run();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let said = run("before");
    assert!(said.contains(WARNS) && said.contains("hint: "), "{said}");
    assert!(daemon.log().contains(BUILDS));
    assert_eq!(daemon.preparations(), 0);
    assert_eq!(daemon.inspect("before")["base"], old.as_str());
    let looked = daemon.ok(["exec", "before", "sh", "-c", LOOK]);
    assert!(size_of_root(&looked) > 19 * GIB, "{looked}");
    daemon.ok(["exec", "before", "sh", "-c", "echo mine >/root/mark; sync"]);
    let boot_id = || daemon.ok(["exec", "before", "cat", "/proc/sys/kernel/random/boot_id"]);
    let booted = boot_id();

    // The current one comes beside it, and the VM that runs does not notice.
    assert_eq!(daemon.ok(["image", "prepare", "--all"]), IMAGE);
    assert_eq!((names(&bases).len(), daemon.preparations()), (2, 1));
    assert!(names(&bases).contains(&old));
    assert_eq!(findings(&daemon, "seed-missing").len(), 0);
    assert_eq!(findings(&daemon, "seeds")[0]["severity"], "ok");
    let listed = daemon.ok(["image", "ls", "--output", "json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&listed).unwrap()[0]["seeds"],
        "current"
    );
    let read_everything = "echo 3 >/proc/sys/vm/drop_caches; cat /usr/bin/* | sha256sum; cat /root/mark";
    let everything = daemon.ok(["exec", "before", "sh", "-c", read_everything]);
    assert!(everything.ends_with("\nmine"), "{everything}");
    assert_eq!(boot_id(), booted);

    // A new VM is quietly made from the current one, and has the same.
    let said = run("after");
    assert!(!said.contains("warning"), "{said}");
    assert_eq!(daemon.log().matches(BUILDS).count(), 1);
    assert_ne!(daemon.inspect("after")["base"], old.as_str());
    assert_eq!(daemon.ok(["exec", "after", "sh", "-c", LOOK]), looked);
    let both = daemon.ok([
        "exec",
        "after",
        "sh",
        "-c",
        &read_everything.replace("; cat /root/mark", ""),
    ]);
    assert_eq!(everything, format!("{both}\nmine"));

    // Once more there is nothing to do; and what a VM needs stays, over restarts and a prune.
    assert_eq!(daemon.ok(["image", "prepare", "--all"]), "");
    assert_eq!(daemon.preparations(), 1);
    daemon.ok(["prune", "--force", "--grace", "0s"]);
    assert!(names(&bases).contains(&old));
    daemon.ok(["restart", "before"]);
    assert_eq!(daemon.ok(["exec", "before", "cat", "/root/mark"]), "mine");
    daemon.ok(["stop", "before"]);
    daemon.ok(["reset", "before"]);
    daemon.ok(["start", "before"]);
    assert_eq!(daemon.ok(["exec", "before", "cat", "/root/mark"]), "mine");
    daemon.ok(["rm", "-f", "before"]);
    daemon.ok(["prune", "--force", "--grace", "0s"]);
    assert_eq!(names(&bases).len(), 1);
    assert!(!names(&bases).contains(&old), "nobody needs it any more");
    daemon.ok(["image", "verify", IMAGE]);
    daemon.finish();
}

#[test]
fn what_was_told_of_a_base_is_not_told_again() {
    let mut daemon = Daemon::start();
    daemon.kill();
    age(&daemon);
    for _ in 0..2 {
        daemon.start_again();
        offshoot_e2e::wait_until("the base to be told of", || daemon.log().contains(FOUND));
        // Whatever else that daemon has to say of it, it has said.
        findings(&daemon, "seed-missing");
        daemon.terminate();
    }
    assert_eq!(daemon.log().matches(FOUND).count(), 1, "{}", daemon.log());
    daemon.start_again();
    // `doctor` mends it, too.
    let output = daemon.cli(["doctor", "--fix", "--output", "json"]).run();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        report["fixes"][0]["done"][0],
        format!("made a base of {IMAGE} with all seeds"),
        "{report:#}"
    );
    assert_eq!(findings(&daemon, "seeds").len(), 1);
    let bases = names(&daemon.data().join("bases"));
    assert_eq!(bases.len(), 1, "no VM has the old one: {bases:?}");
    daemon.finish();
}

/// The bytes of a file that another shares (`FIEMAP`), in all of its pieces.
fn shared(file: &Path) -> u64 {
    let output = Command::new("filefrag").arg("-v").arg(file).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    // `   0:        0..     511:       2144..      2655:    512:             last,shared,eof`, in blocks of 4 KiB.
    let said = text(&output.stdout);
    let shared = said.lines().filter(|line| line.contains("shared"));
    shared
        .map(|line| line.split(':').nth(3).unwrap().trim().parse::<u64>().unwrap() * 4096)
        .sum()
}

/// Runs two VMs with a work disk of 20 GiB to their end; gives those disks.
fn disks_of_two_vms(daemon: &Daemon) -> Vec<PathBuf> {
    let names = ["grown-one", "grown-two"];
    daemon.start_all(&names.map(|name| {
        vec![
            "--name", name, "--memory", "256m", "--work", "20g", IMAGE, "sleep", "100000",
        ]
    }));
    let disk = |name: &str| {
        let looked = daemon.ok(["exec", name, "sh", "-c", LOOK]);
        assert!(size_of_root(&looked) > 19 * GIB, "{looked}");
        daemon.ok(["exec", name, "sh", "-c", "echo kept >/root/file; sync"]);
        daemon.ok(["stop", name]);
        PathBuf::from(daemon.inspect(name)["directory"].as_str().unwrap()).join("work.ext4")
    };
    names.into_iter().map(disk).collect()
}

fn is_clean(disk: &Path) {
    assert_eq!(std::fs::metadata(disk).unwrap().len(), 20 * GIB);
    let output = Command::new("/sbin/e2fsck")
        .arg("-fn")
        .arg(disk)
        .output()
        .unwrap();
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}");
    // `FILE: 12/1310720 files (0.0% non-contiguous), 83886/5242880 blocks`: it has all of the disk.
    assert!(said.contains("/5242880 blocks"), "{said}");
}

#[test]
fn grown_disks_share_the_seed_on_xfs() {
    let daemon = Daemon::start_on_xfs();
    for disk in disks_of_two_vms(&daemon) {
        is_clean(&disk);
        let (all, shared) = (allocated(&disk), shared(&disk));
        assert!(shared > 0, "{} shares nothing", disk.display());
        assert!(
            all - shared < MIB,
            "{} has {} of its own",
            disk.display(),
            all - shared
        );
    }
    assert!(!findings(&daemon, "reflink").is_empty());
    daemon.finish();
}

#[test]
fn grown_disks_are_thin_where_blocks_cannot_be_shared() {
    let daemon = Daemon::start();
    for disk in disks_of_two_vms(&daemon) {
        is_clean(&disk);
        assert!(
            allocated(&disk) < MIB,
            "{} takes {}",
            disk.display(),
            allocated(&disk)
        );
    }
    daemon.finish();
}
