//! What dies, stops or ends by itself: the VMM, the agent, the guest. A clear state each time, nothing lost, no hang.
//!
//! A virtiofsd that dies is in `sharing.rs`: the VM goes on and is told as degraded.

use offshoot_e2e::{Cli, Daemon, IMAGE, Process, signal, text, wait_until};
use rustix::process::Signal;

/// `run -d` words of a VM that sleeps.
fn sleeper<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [
        &["--name", name, "--memory", "192m"],
        more,
        &[IMAGE, "sleep", "1000"],
    ]
    .concat()
}

/// Runs a script in the guest, as root.
fn guest(daemon: &Daemon, vm: &str, script: &str) -> Cli {
    daemon.cli(["exec", vm, "sh", "-c", script])
}

fn pid(daemon: &Daemon, vm: &str) -> i32 {
    let pid = daemon.inspect(vm)["pid"].as_i64().expect("a running VM has one");
    i32::try_from(pid).unwrap()
}

fn id(daemon: &Daemon, vm: &str) -> String {
    daemon.inspect(vm)["id"].as_str().expect("an id").to_owned()
}

fn ends(daemon: &Daemon, vm: &str) {
    wait_until(&format!("the end of {vm} to be noticed"), || {
        daemon.state(vm) == "stopped"
    });
}

/// The last run's status and reason.
fn exit(daemon: &Daemon, vm: &str) -> (i64, String) {
    let exit = daemon.inspect(vm)["exit"].clone();
    let reason = exit["reason"].as_str().unwrap_or_else(|| panic!("{vm}: {exit}"));
    (exit["code"].as_i64().expect("a status"), reason.to_owned())
}

/// Nothing on the machine belongs to a VM that does not run.
fn nothing_runs(daemon: &Daemon, vm: &str) {
    let id = id(daemon, vm);
    let left: Vec<_> = Process::all()
        .into_iter()
        .filter(|process| process.line.contains(&id))
        .collect();
    assert!(left.is_empty(), "{vm}: {left:?}");
    let run = daemon.root().join("run/vms").join(id);
    assert!(!run.exists(), "{vm}: {} is left", run.display());
}

/// The last thing that the history says of a VM.
fn last_event(daemon: &Daemon, vm: &str) -> String {
    let history = daemon.database().history(&id(daemon, vm));
    history.last().cloned().expect("a history")
}

#[test]
fn a_killed_vmm_is_told_and_started_again_where_that_is_wanted() {
    let daemon = Daemon::start();
    daemon.start_all(&[
        sleeper("plain", &[]),
        sleeper("again", &["--restart", "on-failure"]),
    ]);
    for vm in ["plain", "again"] {
        guest(&daemon, vm, "echo kept >/root/kept; sync").ok();
    }
    let old = pid(&daemon, "again");
    for vm in ["plain", "again"] {
        signal(pid(&daemon, vm), Signal::KILL);
    }
    ends(&daemon, "plain");
    assert_eq!(exit(&daemon, "plain"), (255, "vmm-died".to_owned()));
    nothing_runs(&daemon, "plain");
    let event = last_event(&daemon, "plain");
    assert!(
        event.starts_with("exit ") && event.len() > "exit ".len(),
        "{event}"
    );
    let table = daemon.ok(["ps", "-a"]);
    assert!(table.contains("Exited (255)"), "{table}");

    wait_until("the policy to start it again", || {
        // One look: between two the VM may go from one run to the next.
        let seen = daemon.inspect("again");
        seen["state"] == "running" && seen["pid"].as_i64().is_some_and(|pid| pid != i64::from(old))
    });
    daemon.ok(["start", "plain"]);
    for vm in ["plain", "again"] {
        assert_eq!(guest(&daemon, vm, "cat /root/kept").ok(), "kept");
    }
    daemon.finish();
}

/// A script that sets `agent` to the agent's process in the guest.
const FIND_AGENT: &str = "for process in /proc/[0-9]*; do
    case $(tr '\\0' ' ' <$process/cmdline 2>/dev/null) in '@offshoot-agent '*) agent=${process#/proc/} ;; esac
done; ";

/// Does something to the agent that the agent cannot answer: the command ends with its VM.
fn to_the_agent(daemon: &Daemon, vm: &str, what: &str) -> std::process::Child {
    guest(daemon, vm, &format!("{FIND_AGENT} {what}")).spawn()
}

#[test]
fn an_agent_that_its_guest_kills_ends_the_vm() {
    let daemon = Daemon::start();
    daemon.start_all(&[
        sleeper("plain", &[]),
        sleeper("again", &["--restart", "on-failure"]),
    ]);
    let old = pid(&daemon, "again");
    for vm in ["plain", "again"] {
        guest(&daemon, vm, "echo kept >/root/kept; sync").ok();
        let killer = guest(&daemon, vm, &format!("{FIND_AGENT} kill -9 $agent"));
        let killer = killer.in_time();
        assert!(
            !killer.status.success(),
            "{vm}: the session cannot have ended well"
        );
        assert!(!text(&killer.stderr).is_empty(), "{vm}: nothing said why");
    }
    // No orderly end: a policy that starts again after failures does so.
    ends(&daemon, "plain");
    let (code, reason) = exit(&daemon, "plain");
    assert_ne!(code, 0, "{reason}");
    let console = daemon.ok(["logs", "--console", "plain"]);
    // PID 1 sees its end or the end of the socket to it, whichever comes first.
    assert!(console.contains("offshoot-agent: fatal: the agent "), "{console}");
    nothing_runs(&daemon, "plain");
    wait_until("the policy to start it again", || {
        // One look: between two the VM may go from one run to the next.
        let seen = daemon.inspect("again");
        seen["state"] == "running" && seen["pid"].as_i64().is_some_and(|pid| pid != i64::from(old))
    });
    daemon.ok(["start", "plain"]);
    for vm in ["plain", "again"] {
        assert_eq!(guest(&daemon, vm, "cat /root/kept").ok(), "kept");
    }
    daemon.finish();
}

#[test]
fn an_agent_that_its_guest_stops_holds_nobody_up() {
    let daemon = Daemon::start();
    daemon.start_all(&[
        sleeper("stopped", &[]),
        sleeper("removed", &[]),
        sleeper("killed", &[]),
    ]);
    let vms = ["stopped", "removed", "killed"];
    for vm in vms {
        guest(&daemon, vm, "echo kept >/root/kept; sync").ok();
    }
    let frozen = vms.map(|vm| {
        let child = to_the_agent(&daemon, vm, "echo now; kill -STOP $agent");
        // What was started before the agent stood still is no proof that it does.
        wait_until("the agent to stand still", || !answers_at_once(&daemon, vm));
        child
    });

    // Whoever needs the agent is told that it does not answer; whoever does not, is served.
    std::thread::scope(|scope| {
        for words in [
            &["exec", "stopped", "true"][..],
            &["kill", "-s", "USR1", "stopped"],
            &["cp", "stopped:/etc/hostname", "/dev/null"],
            &["cp", "/etc/hostname", "stopped:/root/hostname"],
        ] {
            let cli = daemon.cli(words);
            scope.spawn(move || {
                let output = cli.in_time();
                let said = text(&output.stderr);
                assert!(!output.status.success(), "{words:?}");
                assert!(
                    said.contains("error: ") && said.contains("agent"),
                    "{words:?}: {said}"
                );
            });
        }
    });
    assert_eq!(daemon.state("stopped"), "running");
    for words in [
        &["ps"][..],
        &["logs", "stopped"],
        &["logs", "--console", "stopped"],
        &["pause", "stopped"],
        &["resume", "stopped"],
    ] {
        let output = daemon.cli(words).in_time();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    }

    let output = daemon.cli(["stop", "-t", "2", "stopped"]).in_time();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(daemon.state("stopped"), "stopped");
    nothing_runs(&daemon, "stopped");
    let output = daemon.cli(["kill", "killed"]).in_time();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(exit(&daemon, "killed"), (137, "killed".to_owned()));
    let output = daemon.cli(["rm", "-f", "removed"]).in_time();
    assert!(output.status.success(), "{}", text(&output.stderr));
    daemon.cli(["inspect", "removed"]).fails(1);
    for child in frozen {
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "its VM ended before it could answer");
    }
    daemon.ok(["start", "stopped"]);
    assert_eq!(guest(&daemon, "stopped", "cat /root/kept").ok(), "kept");
    daemon.finish();
}

/// Whether the agent answers while it is looked at; kills the client that waits in vain.
fn answers_at_once(daemon: &Daemon, vm: &str) -> bool {
    let mut child = daemon.cli(["exec", vm, "true"]).spawn();
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_secs(3) {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        offshoot_e2e::after(std::time::Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// How a guest can end itself, and what must be told of it: whether the status is 0, the reasons that are true, and
/// words that the console has.
struct OwnEnd {
    vm: &'static str,
    script: &'static str,
    well: bool,
    reason: &'static str,
    console: &'static str,
}

/// reboot(2): `LINUX_REBOOT_CMD_POWER_OFF` and `LINUX_REBOOT_CMD_RESTART`; 169 is the call on x86-64.
const OWN_ENDS: [OwnEnd; 5] = [
    OwnEnd {
        vm: "power-off",
        script: "perl -e 'syscall(169, 0xfee1dead, 672274793, 0x4321fedc, 0)'",
        well: true,
        reason: "guest-powered-off",
        console: "",
    },
    OwnEnd {
        vm: "reboot",
        script: "perl -e 'syscall(169, 0xfee1dead, 672274793, 0x01234567, 0)'",
        well: true,
        reason: "guest-powered-off",
        console: "",
    },
    OwnEnd {
        vm: "reset",
        script: "echo b >/proc/sysrq-trigger",
        well: true,
        reason: "guest-powered-off",
        console: "",
    },
    OwnEnd {
        vm: "panic",
        script: "echo c >/proc/sysrq-trigger",
        well: false,
        reason: "guest-panicked",
        console: "Kernel panic",
    },
    OwnEnd {
        vm: "init-asked",
        script: "kill -TERM 1",
        well: false,
        reason: "main-exited",
        console: "",
    },
];

#[test]
fn a_guest_that_ends_itself_is_noticed_with_status_and_reason() {
    let daemon = Daemon::start();
    let policy = ["--restart", "on-failure"];
    let runs: Vec<_> = OWN_ENDS
        .iter()
        // What ended well is not started again, whatever the policy for failures.
        .map(|end| sleeper(end.vm, if end.well { &policy } else { &[] }))
        .chain([sleeper("again", &policy)])
        .collect();
    daemon.start_all(&runs);
    let old = pid(&daemon, "again");
    for end in &OWN_ENDS {
        guest(&daemon, end.vm, "echo kept >/root/kept; sync").ok();
        // The session ends with the guest.
        guest(&daemon, end.vm, end.script).in_time();
    }
    for end in &OWN_ENDS {
        ends(&daemon, end.vm);
        let (code, reason) = exit(&daemon, end.vm);
        assert_eq!(code == 0, end.well, "{}: {code}", end.vm);
        assert_eq!(reason, end.reason, "{}", end.vm);
        let console = daemon.ok(["logs", "--console", end.vm]);
        assert!(console.contains(end.console), "{}: {console}", end.vm);
        let event = last_event(&daemon, end.vm);
        assert!(event.starts_with("exit "), "{}: {event}", end.vm);
        nothing_runs(&daemon, end.vm);
    }
    guest(&daemon, "again", "echo c >/proc/sysrq-trigger").in_time();
    wait_until("the policy to start it again", || {
        // One look: between two the VM may go from one run to the next.
        let seen = daemon.inspect("again");
        seen["state"] == "running" && seen["pid"].as_i64().is_some_and(|pid| pid != i64::from(old))
    });
    daemon.ok(["rm", "-f", "again", "reset", "init-asked"]);
    for vm in ["power-off", "reboot", "panic"] {
        assert_eq!(daemon.state(vm), "stopped", "{vm} was started again");
    }
    daemon.all_ok(["power-off", "reboot", "panic"].map(|vm| vec!["start", vm]));
    for vm in ["power-off", "reboot", "panic"] {
        assert_eq!(guest(&daemon, vm, "cat /root/kept").ok(), "kept");
    }
    daemon.finish();
}
