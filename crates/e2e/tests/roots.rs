//! Every way to show a root: the same files as the layers hold, and nothing that one VM writes reaches another.

use std::path::{Path, PathBuf};
use std::process::Command;

use offshoot_e2e::{
    Daemon, FILE_FACTS, IMAGE, Layout, ODD_FACTS, ODD_FILES, XATTR_FACTS, odd_layer, sample, sha256_of_data,
    tell, text, unpack, view,
};

const ROOTS: [&str; 4] = ["pmem", "block", "virtiofs", "copy"];

/// What VMs here get: four of them run at once.
const MEMORY: [&str; 2] = ["--memory", "256m"];

/// What `script` says in a VM about `names`.
fn seen_by(daemon: &Daemon, vm: &str, script: &str, names: &str) -> String {
    daemon
        .cli(["exec", "-i", "-w", "/", vm, "sh", "-c", script])
        .stdin(names)
        .ok()
}

/// Fails with the first line that differs, not with all of them.
fn same(expected: &str, seen: &str, what: &str) {
    for (expected, seen) in expected.lines().zip(seen.lines()) {
        assert_eq!(expected, seen, "{what}");
    }
    assert_eq!(expected.lines().count(), seen.lines().count(), "{what}");
}

#[test]
fn each_root_shows_what_the_layers_hold() {
    let daemon = Daemon::start();
    let mut layout = Layout::of_the_golden_image(&daemon, &daemon.root().join("layout"));
    let odd = daemon.root().join("odd.tar");
    odd_layer(&layout.layers()[0], &odd);
    layout.push(&odd);
    layout.import(&daemon, "odd:1");
    let unpacked = unpack(&layout.layers());
    let host = unpacked.path();
    let files = sample(host, "usr", 200);
    let expected_files = view(host, FILE_FACTS, &files);
    let expected_odd = view(host, ODD_FACTS, ODD_FILES);
    let expected_xattrs = view(host, XATTR_FACTS, ODD_FILES);
    // The expectation itself holds what could get lost.
    assert!(
        expected_xattrs.contains("opt/odd/capable security.capability 01000002"),
        "{expected_xattrs}"
    );
    assert!(
        expected_xattrs.contains("opt/odd/setuid user.colour 677265656e"),
        "{expected_xattrs}"
    );
    for odd in [
        "owner=3000000000:2000000000",
        "mode=89ed",
        "device=1:3",
        "mode=43ff",
    ] {
        assert!(expected_odd.contains(odd), "{odd}: {expected_odd}");
    }

    let runs = ROOTS.map(|root| {
        [
            &["--name", root, "--root", root],
            &MEMORY[..],
            &["odd:1", "sleep", "1000"],
        ]
        .concat()
    });
    daemon.start_all(&runs);
    for root in ROOTS {
        same(&expected_files, &seen_by(&daemon, root, FILE_FACTS, &files), root);
        same(&expected_odd, &seen_by(&daemon, root, ODD_FACTS, ODD_FILES), root);
        same(
            &expected_xattrs,
            &seen_by(&daemon, root, XATTR_FACTS, ODD_FILES),
            root,
        );
        // The capability is not only shown: it counts.
        let read = ["exec", "-u", "nobody", root, "/opt/odd/capable", "/etc/shadow"];
        assert!(
            daemon.ok(read).contains("root:"),
            "{root}: a capability does nothing"
        );
        daemon
            .cli(["exec", "-u", "nobody", root, "cat", "/etc/shadow"])
            .fails(1);
        let decision = &daemon.inspect(root)["root"];
        assert_eq!(decision["chosen"], root);
        assert!(
            decision["reasons"]
                .as_array()
                .is_some_and(|reasons| !reasons.is_empty())
        );
    }
    the_choice_is_told(&daemon);
    daemon.finish();
}

/// Without `--root` the policy chooses, and `inspect` and `--verbose` say what it passed over.
fn the_choice_is_told(daemon: &Daemon) {
    let output = daemon
        .cli(["create", "--verbose", "--name", "chosen", "odd:1", "true"])
        .run();
    let told = text(&output.stderr);
    assert!(output.status.success(), "{told}");
    let decision = daemon.inspect("chosen")["root"].clone();
    let chosen = decision["chosen"].as_str().unwrap();
    assert!(ROOTS.contains(&chosen), "{decision}");
    assert!(told.contains(chosen), "{told}");
    let passed_over = decision["passed_over"].as_array().unwrap();
    assert!(!passed_over.is_empty(), "{decision}");
    for other in passed_over {
        let (name, reason) = (other["name"].as_str().unwrap(), other["reason"].as_str().unwrap());
        assert!(ROOTS.contains(&name) && name != chosen, "{decision}");
        assert!(!reason.is_empty(), "{decision}");
        assert!(told.contains(name) && told.contains(reason), "{told}\n{decision}");
    }
}

/// Everything in a base that VMs share: hashes of files, and of a listing of the tree with its contents.
fn fingerprint(base: &Path) -> Vec<(PathBuf, String)> {
    let files = ["root.erofs", "overlay-seed.ext4", "work-seed.ext4", "base.json"];
    let mut prints: Vec<_> = files
        .iter()
        .map(|name| (base.join(name), sha256_of_data(&base.join(name))))
        .collect();
    let script = "cd \"$0\" && { find . -printf '%P %y %m %U:%G %s %n %T@ %l\\n' | sort; \
        find . -type f -print0 | sort -z | xargs -0 sha256sum --; } | sha256sum";
    let tree = base.join("tree");
    let listed = Command::new("sh")
        .args(["-c", script])
        .arg(&tree)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    prints.push((tree, text(&listed.stdout)));
    prints
}

/// Writes, changes and deletes in places that all VMs share below.
const WRITE: &str =
    "set -e; echo $0 >/etc/mine; echo $0 >/root/mine; echo $0 >/etc/debian_version; echo $0 >>/usr/bin/ldd
    rm /etc/issue; mkdir /opt/$0; chmod 700 /usr/games; sync";

/// What a VM sees of all that.
const READ: &str =
    "cat /etc/mine /root/mine /etc/debian_version; tail -n 1 /usr/bin/ldd; test -e /etc/issue && echo issue
    ls /opt; stat -c %a /usr/games";

/// What `root` of the guest can try against what it shares: whatever says that it cannot be written is told that it can.
/// Prints how many things it tried.
const ATTACK: &str = "n=0
    for disk in /sys/block/*; do
        name=${disk##*/}
        case $name in pmem*) ;; vd*) [ \"$(cat $disk/ro)\" = 1 ] || continue ;; *) continue ;; esac
        n=$((n + 1)); blockdev --setrw /dev/$name
        dd if=/dev/urandom of=/dev/$name bs=4096 count=1 seek=$(($(cat $disk/size) / 8 - 1)) conv=notrunc,fsync
    done
    for tag in /sys/fs/virtiofs/*/tag; do
        [ -e $tag ] || continue
        n=$((n + 1)); mkdir -p /attack; mount -t virtiofs \"$(cat $tag)\" /attack; mount -o remount,rw /attack
        echo evil >/attack/evil; echo evil >/attack/etc/issue; chmod 777 /attack/etc; rm -rf /attack/opt
    done
    echo tried $n";

#[test]
fn what_a_vm_writes_is_its_own_and_stays() {
    let daemon = Daemon::start();
    // Two with one kind of root, as they share most.
    let vms = ["pmem", "block", "virtiofs", "copy", "pmem-too"];
    let runs = vms.map(|vm| {
        let root = vm.trim_end_matches("-too");
        [
            &["--name", vm, "--root", root],
            &MEMORY[..],
            &[IMAGE, "sleep", "1000"],
        ]
        .concat()
    });
    daemon.start_all(&runs);
    let base = daemon.inspect("pmem")["base"].as_str().unwrap().to_owned();
    for vm in vms {
        assert_eq!(daemon.inspect(vm)["base"], base.as_str(), "one base for all");
    }
    let base = daemon.data().join("bases").join(base);
    let before = fingerprint(&base);
    let version = daemon.ok(["exec", "pmem-too", "cat", "/etc/debian_version"]);
    for vm in ["pmem", "block", "virtiofs", "copy"] {
        daemon.ok(["exec", vm, "sh", "-c", WRITE, vm]);
    }
    let own = |vm: &str| format!("{vm}\n{vm}\n{vm}\n{vm}\n{vm}\n700");
    for vm in ["pmem", "block", "virtiofs", "copy"] {
        assert_eq!(daemon.ok(["exec", vm, "sh", "-c", READ]), own(vm));
    }
    let untouched = daemon.ok(["exec", "pmem-too", "sh", "-c", &format!("({READ}) 2>/dev/null")]);
    assert!(untouched.starts_with(&version), "{untouched}");
    assert!(untouched.ends_with("issue\n755"), "{untouched}");

    daemon.ok(["stop", "-t", "2", "pmem", "block", "virtiofs", "copy"]);
    daemon.all_ok(["pmem", "block", "virtiofs", "copy"].map(|vm| vec!["start", vm]));
    for vm in ["pmem", "block", "virtiofs", "copy"] {
        assert_eq!(
            daemon.ok(["exec", vm, "sh", "-c", READ]),
            own(vm),
            "after a new start"
        );
    }

    // Dropping what was written to `/` needs the VM to stand still; the work disk is no part of it.
    let running = daemon.cli(["reset", "pmem"]).fails(1);
    assert!(running.contains("reset -f"), "{running}");
    for vm in ["pmem", "block", "virtiofs", "copy"] {
        assert_eq!(daemon.ok(["reset", "-f", vm]), vm);
        assert_ne!(daemon.state(vm), "running");
    }
    daemon.all_ok(["pmem", "block", "virtiofs", "copy"].map(|vm| vec!["start", vm]));
    for vm in ["pmem", "block", "virtiofs", "copy"] {
        let seen = daemon.ok([
            "exec",
            vm,
            "sh",
            "-c",
            "test ! -e /etc/mine && cat /root/mine /etc/debian_version",
        ]);
        assert_eq!(seen, format!("{vm}\n{version}"));
        let seen = daemon.ok([
            "exec",
            vm,
            "sh",
            "-c",
            "test -e /etc/issue && stat -c %a /usr/games && ls /opt",
        ]);
        assert_eq!(seen, "755");
    }

    for vm in ["pmem", "block", "virtiofs"] {
        // Its own VM may be past saving afterwards.
        let output = daemon.cli(["exec", vm, "sh", "-c", ATTACK]).run();
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        tell(&format!("an attack from {vm}: {said}"));
        assert!(
            said.contains("tried 1"),
            "{vm} shares something that was not found: {said}"
        );
    }
    assert_eq!(
        daemon
            .ok(["exec", "pmem-too", "cat", "/etc/issue"])
            .lines()
            .count(),
        1
    );
    assert_eq!(fingerprint(&base), before, "a VM changed what others share");
    daemon.finish();
}

/// Bytes read of all of `/usr`, and by how many the guest's page cache grew.
fn cached_by_reading(daemon: &Daemon, vm: &str) -> (u64, u64) {
    let script = "cached() { sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
        sync; echo 3 >/proc/sys/vm/drop_caches; before=$(cached)
        bytes=$(find /usr -xdev -type f -print0 | xargs -0 cat | wc -c)
        echo $bytes $before $(cached)";
    let said = daemon.ok(["exec", vm, "sh", "-c", script]);
    let numbers: Vec<u64> = said
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let [bytes, before, after] = numbers[..] else {
        panic!("{said}")
    };
    (bytes, after.saturating_sub(before) * 1024)
}

#[test]
fn pmem_does_not_copy_the_root_into_the_guest() {
    let daemon = Daemon::start();
    let runs = ["pmem", "block"].map(|root| {
        vec![
            "--name", root, "--root", root, "--memory", "512m", IMAGE, "sleep", "1000",
        ]
    });
    daemon.start_all(&runs);
    let mut shares = Vec::new();
    for root in ["pmem", "block"] {
        let (bytes, cached) = cached_by_reading(&daemon, root);
        assert!(bytes > 50_000_000, "{root}: /usr has only {bytes} bytes");
        let share = cached * 100 / bytes;
        tell(&format!(
            "{root}: the guest read {} MB of /usr, and its page cache grew by {} MB ({share} %)",
            bytes / 1_000_000,
            cached / 1_000_000
        ));
        shares.push(share);
    }
    assert!(
        shares[0] < 10,
        "with pmem the guest cached {} % of what it read",
        shares[0]
    );
    // Else the figure above would mean nothing.
    assert!(shares[1] > 50, "with block the guest cached only {} %", shares[1]);
    daemon.finish();
}
