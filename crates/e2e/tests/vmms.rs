//! The other VMMs, with real VMs: the same life as on QEMU.
//!
//! Each is taken from `OFFSHOOT_CLOUD_HYPERVISOR`, `OFFSHOOT_FIRECRACKER` or `PATH`; one that is not there is skipped and
//! named. `OFFSHOOT_KVM_KERNEL` names a `vmlinux` with everything built in, for hosts whose KVM cannot run a distribution's.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use offshoot_e2e::{Daemon, IMAGE, tell, text, wait_until};

/// A guest whose kernel is interpreted takes minutes to boot.
const SETTINGS: &str = "boot_timeout_s = 1200";

fn installed(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|path| !path.is_empty());
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = || {
        std::env::split_paths(&paths)
            .map(|folder| folder.join(name))
            .find(|path| path.is_file())
    };
    named.map(PathBuf::from).or_else(found)
}

/// Whether a device is open to everybody, or to a group that is not root's own.
fn is_open(device: &str) -> bool {
    std::fs::metadata(device)
        .is_ok_and(|meta| meta.mode() & 0o006 == 0o006 || meta.mode() & 0o060 == 0o060 && meta.gid() != 0)
}

/// A daemon that has the VMM, and the kernel to try it with; `None`, and a word about it, where it cannot be tried.
fn daemon_with(variable: &str, name: &str) -> Option<Daemon> {
    let Some(program) = installed(variable, name) else {
        tell(&format!("SKIPPED: {name} is not installed; {variable} names one"));
        return None;
    };
    if !is_open("/dev/kvm") {
        tell(&format!(
            "SKIPPED: {name} needs a /dev/kvm that is open to unprivileged VMMs"
        ));
        return None;
    }
    let key = name.replace('-', "_");
    let daemon = Daemon::start_with(&format!(
        "{SETTINGS}\n{key} = {:?}",
        program.display().to_string()
    ));
    if let Some(kernel) = std::env::var_os("OFFSHOOT_KVM_KERNEL").and_then(|path| path.into_string().ok()) {
        daemon.ok(["kernel", "add", "--vmlinux", &kernel]);
    }
    let info = daemon.ok(["system", "info"]);
    assert!(info.contains(&format!("{name} ")), "{info}");
    Some(daemon)
}

/// One VM's whole life.
fn lives(daemon: &mut Daemon, vmm: &str, root: &str, network: &str) {
    let vm = format!("{vmm}-{root}");
    let run = [
        "run",
        "-d",
        "--vmm",
        vmm,
        "--root",
        root,
        "--network",
        network,
        "--memory",
        "256m",
        "--name",
    ];
    daemon.ok(run.into_iter().chain([vm.as_str(), IMAGE, "sleep", "100000"]));
    let details = daemon.inspect(&vm);
    assert_eq!(details["vmm"]["chosen"], vmm, "{details}");
    assert_eq!(details["root"]["chosen"], root, "{details}");
    assert_eq!(
        daemon.ok(["exec", &vm, "sh", "-c", "echo in; echo $((6*7))"]),
        "in\n42"
    );
    daemon.cli(["exec", &vm, "sh", "-c", "exit 9"]).fails(9);

    let (there, back) = (daemon.root().join("there"), daemon.root().join("back"));
    let sent: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&there, &sent).unwrap();
    daemon.ok(["cp", there.to_str().unwrap(), &format!("{vm}:/root/there")]);
    daemon.ok(["cp", &format!("{vm}:/root/there"), back.to_str().unwrap()]);
    assert!(
        std::fs::read(&back).unwrap() == sent,
        "what comes back is what was sent"
    );
    std::fs::remove_file(&back).unwrap();
    if network != "none" {
        let addresses = daemon.ok(["exec", &vm, "cat", "/proc/net/dev"]);
        assert!(addresses.contains("eth0"), "{addresses}");
    }

    daemon.ok(["pause", &vm]);
    assert_eq!(daemon.state(&vm), "paused");
    daemon.ok(["resume", &vm]);

    // Another daemon goes on with it.
    let pid = details["pid"].clone();
    daemon.kill();
    daemon.start_again();
    assert_eq!(daemon.inspect(&vm)["pid"], pid, "the same process");
    wait_until("the agent to be found again", || {
        daemon.cli(["exec", &vm, "true"]).run().status.success()
    });
    let console = daemon.cli(["logs", "--console", &vm]).run();
    assert!(console.status.success(), "{}", text(&console.stderr));

    daemon.ok(["stop", "-t", "60", &vm]);
    assert_eq!(daemon.state(&vm), "stopped");
    let exit = daemon.inspect(&vm)["exit"].clone();
    assert_eq!(exit["reason"], "stopped", "{exit}");
    daemon.ok(["rm", &vm]);
}

/// `Rss` and `Pss` of a process's mappings of a file, KiB.
fn mapped(pid: &str, file: &Path) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut ours, mut rss, mut pss) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next().unwrap_or_default(), words.next()) {
            ("Rss:", Some(kib)) if ours => rss += kib.parse::<u64>().expect("a number"),
            ("Pss:", Some(kib)) if ours => pss += kib.parse::<u64>().expect("a number"),
            // `address-address permissions …` begins a mapping.
            (word, _) if !word.ends_with(':') => {
                ours = Path::new(words.next_back().unwrap_or_default()) == file;
            }
            _ => {}
        }
    }
    (rss, pss)
}

/// Two VMs on one base: what both have read of it is in the host's memory once.
fn share_pages(daemon: &Daemon, vmm: &str) {
    let names = ["a", "b"].map(|name| format!("{vmm}-{name}"));
    for name in &names {
        daemon.ok([
            "run",
            "-d",
            "--vmm",
            vmm,
            "--root",
            "pmem",
            "--network",
            "none",
            "--memory",
            "256m",
            "--name",
            name,
            IMAGE,
            "sleep",
            "100000",
        ]);
        daemon.ok([
            "exec",
            name,
            "sh",
            "-c",
            "cat /usr/bin/perl /usr/lib/x86_64-linux-gnu/*.so.* >/dev/null",
        ]);
    }
    let bases = daemon.data().join("bases");
    let bases = std::fs::read_dir(bases).expect("bases");
    let files = bases.map(|base| base.expect("a base").path().join("root.erofs"));
    let file = files.into_iter().find(|file| file.exists()).expect("a base");
    for name in &names {
        let pid = daemon.inspect(name)["pid"].to_string();
        let (rss, pss) = mapped(&pid, &file);
        tell(&format!(
            "{name}: of the base {rss} KiB are mapped, its share is {pss} KiB"
        ));
        assert!(rss > 1024, "{rss} KiB");
        assert!(pss * 10 < rss * 6, "{pss} of {rss} KiB");
    }
    for name in &names {
        daemon.ok(["rm", "-f", name]);
    }
}

/// What tells a VM from every other, a line each.
const WHO: &str =
    "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 65536 /dev/urandom | sha256sum";

/// Two VMs that go on from one template are two VMs.
fn are_restored(daemon: &Daemon, vmm: &str, root: &str, network: &str) {
    let names = ["x", "y"].map(|name| format!("{vmm}-{root}-{name}"));
    let mut said = Vec::new();
    for name in &names {
        daemon.ok([
            "run",
            "-d",
            "--boot",
            "template",
            "--vmm",
            vmm,
            "--root",
            root,
            "--network",
            network,
            "--memory",
            "256m",
            "--name",
            name,
            IMAGE,
            "sleep",
            "100000",
        ]);
        let details = daemon.inspect(name);
        assert_eq!(details["boot"]["chosen"], "template", "{details}");
        // The memory is nobody's copy: what is mapped is the template's, privately.
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", details["pid"])).expect("maps");
        let mut memory = maps.lines().filter(|line| line.contains("/memfd:offshoot-"));
        assert!(memory.any(|line| line.contains(" rw-p ")), "{maps}");
        let who = daemon.ok(["exec", name, "sh", "-c", WHO]);
        said.push(who.lines().map(str::to_owned).collect::<Vec<_>>());
        daemon.ok([
            "exec",
            name,
            "sh",
            "-c",
            &format!("echo {name} >/root/mine; sync"),
        ]);
    }
    assert_eq!(said[0].len(), 4, "{said:?}");
    for (one, other) in said[0].iter().zip(&said[1]) {
        assert_ne!(one, other, "{said:?}");
    }
    for name in &names {
        assert_eq!(&daemon.ok(["exec", name, "cat", "/root/mine"]), name);
        daemon.ok(["stop", "-t", "60", name]);
        daemon.ok(["rm", name]);
    }
}

#[test]
fn a_base_is_in_memory_once_on_cloud_hypervisor() {
    if let Some(daemon) = daemon_with("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor") {
        share_pages(&daemon, "cloud-hypervisor");
        daemon.finish();
    }
}

#[test]
fn a_base_is_in_memory_once_on_firecracker() {
    if let Some(daemon) = daemon_with("OFFSHOOT_FIRECRACKER", "firecracker") {
        share_pages(&daemon, "firecracker");
        daemon.finish();
    }
}

#[test]
fn two_of_one_template_on_cloud_hypervisor() {
    if let Some(daemon) = daemon_with("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor") {
        are_restored(&daemon, "cloud-hypervisor", "pmem", "default");
        are_restored(&daemon, "cloud-hypervisor", "block", "none");
        daemon.finish();
    }
}

#[test]
fn two_of_one_template_on_firecracker() {
    if let Some(daemon) = daemon_with("OFFSHOOT_FIRECRACKER", "firecracker") {
        let network = if is_open("/dev/net/tun") {
            "default"
        } else {
            "none"
        };
        are_restored(&daemon, "firecracker", "pmem", network);
        are_restored(&daemon, "firecracker", "block", "none");
        daemon.finish();
    }
}

#[test]
fn a_virtiofs_root_and_two_folders_on_cloud_hypervisor() {
    let Some(daemon) = daemon_with("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor") else {
        return;
    };
    let folders = ["one", "two"].map(|name| daemon.root().join(name));
    for folder in &folders {
        std::fs::create_dir(folder).expect("a folder");
        std::fs::write(folder.join("theirs"), "from the host").expect("a file");
    }
    let [one, two] = folders.each_ref().map(|folder| folder.display().to_string());
    daemon.ok([
        "run",
        "-d",
        "--vmm",
        "cloud-hypervisor",
        "--root",
        "virtiofs",
        "--network",
        "none",
        "--memory",
        "256m",
        "-v",
        &format!("{one}:/one"),
        "-v",
        &format!("{two}:/two:ro"),
        "--name",
        "shares",
        IMAGE,
        "sleep",
        "100000",
    ]);
    let script = "cat /one/theirs /two/theirs; echo mine >/one/mine; ! echo mine 2>/dev/null >/two/mine";
    assert_eq!(
        daemon.ok(["exec", "shares", "sh", "-c", script]),
        "from the hostfrom the host"
    );
    assert_eq!(
        std::fs::read_to_string(folders[0].join("mine")).expect("a file"),
        "mine\n"
    );
    let pid = daemon.inspect("shares")["pid"].to_string();
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).expect("its arguments");
    let flags = words
        .split(|byte| *byte == 0)
        .filter(|word| *word == b"--fs")
        .count();
    assert_eq!(flags, 1, "the root and both folders follow one flag");
    daemon.ok(["stop", "-t", "60", "shares"]);
    daemon.ok(["rm", "shares"]);
    daemon.finish();
}

#[test]
fn a_life_on_cloud_hypervisor() {
    let Some(mut daemon) = daemon_with("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor") else {
        return;
    };
    lives(&mut daemon, "cloud-hypervisor", "pmem", "default");
    lives(&mut daemon, "cloud-hypervisor", "block", "none");
    daemon.finish();
}

#[test]
fn a_life_on_firecracker() {
    let Some(mut daemon) = daemon_with("OFFSHOOT_FIRECRACKER", "firecracker") else {
        return;
    };
    let network = if is_open("/dev/net/tun") {
        "default"
    } else {
        "none"
    };
    lives(&mut daemon, "firecracker", "pmem", network);
    lives(&mut daemon, "firecracker", "block", "none");
    daemon.finish();
}

#[test]
fn what_a_vmm_cannot_do_is_refused_before_anything_is_made() {
    let daemon = Daemon::start_with("firecracker = \"/nonexistent/firecracker\"");
    let refuse = |arguments: &[&str], words: &[&str]| {
        let error = daemon.cli(arguments.iter().copied()).fails(1);
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    };
    refuse(
        &["create", "--vmm", "firecracker", IMAGE, "true"],
        &[
            "firecracker",
            "/nonexistent/firecracker",
            "not installed",
            "docs/config.md",
        ],
    );
    assert_eq!(daemon.ok(["ps", "-aq"]), "");
    // Asked for by nobody, it is passed over, and that is told.
    daemon.ok(["create", "--name", "chosen", IMAGE, "true"]);
    let vmm = daemon.inspect("chosen")["vmm"].clone();
    assert_eq!(vmm["chosen"], "qemu");
    let passed_over = vmm["passed_over"].as_array().unwrap();
    let firecracker = passed_over.iter().find(|other| other["name"] == "firecracker");
    let reason = firecracker.unwrap()["reason"].as_str().unwrap();
    assert!(reason.contains("not installed"), "{reason}");
    daemon.ok(["rm", "chosen"]);
    daemon.finish();
}
