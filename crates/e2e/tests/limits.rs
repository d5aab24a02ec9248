//! What VMs may take: their control groups, and who is let in at all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use offshoot_e2e::{Daemon, IMAGE, bin_dir, names, refused, tell, wait_until};
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// In what slices of time the kernel gives out processor time, microseconds.
const PERIOD_US: u64 = 100_000;

/// The folders of a VM's control group, on every hierarchy.
fn groups(id: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if entry.file_name() == id {
                found.push(entry.path());
            }
            pending.push(entry.path());
        }
    }
    found.sort();
    found
}

/// The first of these files that a group has, with its path.
fn control(groups: &[PathBuf], names: &[&str]) -> (PathBuf, String) {
    let paths = names
        .iter()
        .flat_map(|name| groups.iter().map(move |group| group.join(name)));
    let mut found = paths.filter_map(|path| Some((path.clone(), std::fs::read_to_string(path).ok()?)));
    found
        .next()
        .unwrap_or_else(|| panic!("none of {names:?} in {groups:?}"))
}

fn number(text: &str) -> u64 {
    text.trim()
        .parse()
        .unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// Processor time of a group, microseconds.
fn cpu_us(groups: &[PathBuf]) -> u64 {
    let (path, text) = control(groups, &["cpuacct.usage", "cpu.stat"]);
    if path.ends_with("cpuacct.usage") {
        return number(&text) / 1000;
    }
    value(&text, "usage_usec")
}

fn value(text: &str, key: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    number(line.unwrap_or_else(|| panic!("no {key} in {text}")))
}

fn periods(groups: &[PathBuf]) -> u64 {
    value(&control(groups, &["cpu.stat"]).1, "nr_periods")
}

fn members(group: &Path) -> BTreeSet<i64> {
    let text = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn stats(daemon: &Daemon, vm: &str) -> Value {
    let text = daemon.ok(["stats", "--no-stream", "--output", "json", vm]);
    let value: Value = serde_json::from_str(&text).unwrap();
    value[0].clone()
}

#[test]
fn a_vms_processes_are_in_its_group_and_kept_to_its_limits() {
    let mut daemon = Daemon::start();
    let shared = daemon.root().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let volume = format!("{}:/shared", shared.display());
    daemon.ok([
        "run", "-d", "--name", "fenced", "--memory", "256m", "-v", &volume, IMAGE, "sleep", "100000",
    ]);
    let details = daemon.inspect("fenced");
    let id = details["id"].as_str().unwrap().to_owned();
    let groups_of_vm = groups(&id);
    assert!(
        !groups_of_vm.is_empty(),
        "no control groups: {}",
        daemon.ok(["doctor"])
    );

    // Everything that runs for the VM is in it, and nothing else.
    let mut processes: BTreeSet<i64> = daemon
        .virtiofsds_of(&shared)
        .iter()
        .map(|process| process.pid.into())
        .collect();
    assert!(!processes.is_empty());
    processes.insert(details["pid"].as_i64().unwrap());
    for group in &groups_of_vm {
        assert_eq!(members(group), processes, "{}", group.display());
    }

    // The limits are those that are told, and they hold across a restart of the daemon.
    for restarted in [false, true] {
        if restarted {
            daemon.kill();
            daemon.start_again();
            wait_until("the VM to be found again", || daemon.state("fenced") == "running");
        }
        let told = stats(&daemon, "fenced");
        let memory = number(&control(&groups_of_vm, &["memory.max", "memory.limit_in_bytes"]).1);
        assert_eq!(told["memory"]["limit"], memory, "{told}");
        assert!((256 * MIB + 128 * MIB..4096 * MIB).contains(&memory), "{memory}");
        let pids = number(&control(&groups_of_vm, &["pids.max"]).1);
        assert_eq!(told["pids"]["limit"], pids, "{told}");
        // One vCPU, and one processor for what works for it.
        assert_eq!(told["cpu"]["limit_milli"], 2000, "{told}");
        assert_eq!(told["memory"]["guest"], 256 * MIB);
        assert!(
            told["memory"]["processes"]["processes"].as_u64().unwrap() >= 2,
            "{told}"
        );
        assert!(told["disk"]["allocated"].as_u64().unwrap() > 0, "{told}");
        assert!(told["pids"]["current"].as_u64().unwrap() > 2, "{told}");
    }
    let table = daemon.ok(["stats", "--no-stream", "fenced"]);
    assert!(table.contains("fenced") && table.contains("/ 256MiB"), "{table}");
    assert!(daemon.ok(["stats", "--no-stream"]).contains(&id));

    // A guest that does all it can: more processes than it has vCPUs for, and ever more of them.
    let before = (cpu_us(&groups_of_vm), periods(&groups_of_vm));
    let bomb = "ulimit -u 40; perl -e 'fork while 1' & for n in 1 2 3 4; do (while :; do :; done) & done";
    daemon.ok(["exec", "-d", "--user", "nobody", "fenced", "sh", "-c", bomb]);
    wait_until("forty busy periods", || periods(&groups_of_vm) >= before.1 + 40);
    let used = cpu_us(&groups_of_vm) - before.0;
    let periods = periods(&groups_of_vm) - before.1;
    assert!(used > PERIOD_US, "the guest does nothing: {used} us");
    // The kernel hands out the quota in slices and evens that out in the next period.
    let most = (periods + 2) * 2 * PERIOD_US * 5 / 4;
    assert!(used <= most, "{used} us in {periods} periods");
    let told = stats(&daemon, "fenced");
    assert!(
        told["pids"]["current"].as_u64() <= told["pids"]["limit"].as_u64(),
        "{told}"
    );
    assert!(told["cpu"]["used_us"].as_u64().unwrap() >= used, "{told}");
    assert_eq!(told["memory"]["oom_kills"], 0);
    assert_eq!(daemon.state("fenced"), "running");

    // What is left in the group when the VM stops is killed: here, a process that got in by our hand.
    let mut straggler = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    for group in &groups_of_vm {
        std::fs::write(group.join("cgroup.procs"), straggler.id().to_string()).unwrap();
    }
    daemon.ok(["stop", "-t", "1", "fenced"]);
    use std::os::unix::process::ExitStatusExt as _;
    let exit = straggler.wait().unwrap();
    assert_eq!(exit.signal(), Some(Signal::KILL.as_raw()));
    assert_eq!(groups(&id), [""; 0].map(PathBuf::from), "after stop");
    let refused_stats = daemon.cli(["stats", "--no-stream", "fenced"]).fails(1);
    assert!(refused_stats.contains("offshoot start fenced"), "{refused_stats}");

    daemon.ok(["start", "fenced"]);
    let groups_of_vm = groups(&id);
    assert!(!groups_of_vm.is_empty());
    daemon.ok(["rm", "-f", "fenced"]);
    assert_eq!(groups(&id), [""; 0].map(PathBuf::from), "after rm");
    for instance in groups_of_vm.iter().filter_map(|group| group.parent()) {
        assert!(!instance.exists(), "{} is left", instance.display());
    }
    daemon.finish();
}

#[test]
fn a_vm_that_was_out_of_memory_says_so() {
    let daemon = Daemon::start();
    daemon.ok([
        "run", "-d", "--name", "hungry", "--memory", "256m", IMAGE, "sleep", "100000",
    ]);
    let details = daemon.inspect("hungry");
    let groups_of_vm = groups(details["id"].as_str().unwrap());
    let now = control(&groups_of_vm, &["memory.current", "memory.usage_in_bytes"]).1;
    let (limit, _) = control(&groups_of_vm, &["memory.max", "memory.limit_in_bytes"]);
    // A healthy VM never meets its limit, so here it is taken down to what the VM has already.
    std::fs::write(&limit, (number(&now) + 4 * MIB).to_string()).unwrap();
    let _ = daemon
        .cli([
            "exec",
            "hungry",
            "sh",
            "-c",
            "head -c 120m /dev/zero >/dev/shm/zeros",
        ])
        .run();
    wait_until("the VM to end", || daemon.state("hungry") == "stopped");
    let details = daemon.inspect("hungry");
    assert_eq!(details["exit"]["reason"], "vmm-died", "{details}");
    let failure = details["failure"][0].as_str().unwrap_or_default();
    assert!(failure.contains("out of memory"), "{details}");
    // It starts again, under the limit that is right for it.
    daemon.ok(["start", "hungry"]);
    assert_eq!(daemon.inspect("hungry")["failure"], Value::Array(Vec::new()));
    assert_eq!(stats(&daemon, "hungry")["memory"]["oom_kills"], 0);
    daemon.finish();
}

/// The newest program in `target` of the tests of control groups.
fn tests_of_control_groups() -> String {
    let deps = bin_dir().join("deps");
    let programs = names(&deps).into_iter().filter(|name| {
        let hash = name.strip_prefix("cgroups-").unwrap_or_default();
        !hash.is_empty() && hash.bytes().all(|digit| digit.is_ascii_hexdigit())
    });
    let age = |name: &String| {
        std::fs::metadata(deps.join(name))
            .and_then(|meta| meta.modified())
            .ok()
    };
    programs
        .max_by_key(age)
        .expect("the tests of crates/sys are built; run `make test`")
}

#[test]
fn groups_of_version_2_work_in_a_delegated_subtree() {
    // This host may have version 1. A guest has version 2, and nobody else in it.
    let daemon = Daemon::start();
    let volume = format!("{}:/programs:ro", bin_dir().join("deps").display());
    daemon.ok([
        "run", "-d", "--name", "v2", "-v", &volume, IMAGE, "sleep", "100000",
    ]);
    let program = format!("/programs/{}", tests_of_control_groups());
    let listed = daemon.cli(["exec", "v2", &program, "--list"]).run();
    if !listed.status.success() {
        tell("SKIPPED: programs of this host do not run in the guest: its C library is older");
        return daemon.finish();
    }
    // 188 is setxattr(2). systemd marks so what it gives away.
    let script = r#"set -e
        g=/sys/fs/cgroup; s=$g/system.slice/offshootd.service
        mkdir -p $s
        for d in $g $g/system.slice; do echo '+cpu +memory +pids' >$d/cgroup.subtree_control; done
        perl -e 'my ($p, $n, $v) = @ARGV; syscall(188, $p, $n, $v, 1, 0) == 0 or die $!' $s trusted.delegate 1
        sh -c 'echo $$ >$1/cgroup.procs; exec $2 --test-threads=1 --nocapture 2>&1' sh $s $1
        cat $s/cgroup.subtree_control; ls -d $s/*/"#;
    let said = daemon.ok(["exec", "v2", "sh", "-c", script, "sh", &program]);
    assert!(said.contains("test result: ok. "), "{said}");
    assert!(!said.contains("SKIPPED"), "{said}");
    // It has moved into a leaf and handed down what it needs; no group of a test is left.
    let end: Vec<_> = said.lines().rev().take(2).collect();
    let leaf = "/sys/fs/cgroup/system.slice/offshootd.service/daemon/";
    assert_eq!(end, [leaf, "cpu memory pids"], "{said}");
    daemon.finish();
}

/// All memory of this host, MiB.
fn host_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .unwrap();
    number(line.trim().strip_suffix("kB").unwrap()) / 1024
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_made() {
    let daemon = Daemon::start_with("memory_overcommit = 1.0");
    let larger = format!("{}m", host_mib() + 1);
    for verb in ["create", "run"] {
        let error = refused(
            &daemon,
            &[verb, "--memory", &larger, IMAGE, "true"],
            "this host has",
        );
        assert!(error.contains("--memory"), "{error}");
    }
    assert_eq!(daemon.ok(["ps", "-aq"]), "");
    assert_eq!(names(&daemon.data().join("vms")), [""; 0]);

    // Two that fit each, but not both at once.
    let most = format!("{}m", host_mib() * 6 / 10);
    for vm in ["one", "two"] {
        daemon.ok([
            "create", "--name", vm, "--memory", &most, IMAGE, "sleep", "100000",
        ]);
    }
    daemon.ok(["start", "one"]);
    let error = daemon.cli(["start", "two"]).fails(1);
    assert!(error.contains("promised to 1 running VMs"), "{error}");
    assert!(error.contains("memory_overcommit"), "{error}");
    assert_eq!(daemon.state("two"), "failed");
    refused(
        &daemon,
        &["create", "--memory", &most, IMAGE, "true"],
        "promised to 1 running VMs",
    );
    daemon.ok(["rm", "-f", "one"]);
    daemon.ok(["start", "two"]);
    daemon.finish();
}

#[test]
fn no_vm_is_created_on_a_full_disk() {
    // No disk has so much free.
    let daemon = Daemon::start_with(&format!("disk_reserve_mib = {}", 1u64 << 40));
    let error = refused(
        &daemon,
        &["create", IMAGE, "true"],
        "are free in the data directory",
    );
    assert!(error.contains("offshoot prune"), "{error}");
    daemon.finish();
}
