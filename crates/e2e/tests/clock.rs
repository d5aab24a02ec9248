//! A host's clock that jumps by an hour, forward and back: what waits goes on waiting, what runs goes on running.
//!
//! The daemon and the CLI see a clock that the test sets (libfaketime); the clock that only goes forward is the real one.

use std::path::{Path, PathBuf};

use offshoot_e2e::{Cli, Daemon, IMAGE, names, text, wait_until};

const HOUR: i64 = 3600;

/// A clock, by how many seconds it is wrong.
struct Clock {
    folder: tempfile::TempDir,
    library: PathBuf,
}

impl Clock {
    fn new() -> Self {
        let library = names(Path::new("/usr/lib"))
            .into_iter()
            .map(|name| Path::new("/usr/lib").join(name).join("faketime/libfaketime.so.1"))
            .find(|path| path.exists())
            .expect("libfaketime; run scripts/install-deps");
        let folder = tempfile::tempdir().unwrap();
        let clock = Self { folder, library };
        clock.set(0);
        clock
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("offset")
    }

    fn set(&self, seconds: i64) {
        // In one step, for whoever reads it now.
        let new = self.folder.path().join("new");
        std::fs::write(&new, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(new, self.file()).unwrap();
    }

    fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ]
    }

    /// A CLI with the same clock.
    fn cli(&self, daemon: &Daemon, words: &[&str]) -> Cli {
        let cli = daemon.cli(words);
        self.env()
            .into_iter()
            .fold(cli, |cli, (name, value)| cli.env(name, &value))
    }
}

fn words<'a>(verb: &[&'a str], name: &'a str, command: &[&'a str]) -> Vec<&'a str> {
    [verb, &["--name", name, "--memory", "192m", IMAGE], command].concat()
}

/// A main process that ends when told by a file, and not otherwise.
const STUBBORN: [&str; 3] = [
    "sh",
    "-c",
    "trap '' TERM; echo deaf; while ! test -e /go; do sleep 0.1; done; exit 5",
];

/// The line of `ps -a` about a VM, with an age that a person can believe.
fn told(clock: &Clock, daemon: &Daemon, vm: &str, status: &str) {
    let table = clock.cli(daemon, &["ps", "-a"]).ok();
    let line = table.lines().find(|line| line.contains(vm)).unwrap_or_default();
    assert!(line.contains(status), "{table}");
    for absurd in ["year", "month", "week", "day"] {
        assert!(!line.contains(absurd), "{table}");
    }
}

#[test]
fn a_clock_that_jumps_changes_nothing_that_runs() {
    let clock = Clock::new();
    let mut daemon = Daemon::start_with_env(clock.env());
    let policy = ["run", "-d", "--restart", "on-failure"];
    daemon.ok(words(&policy, "steady", &["sleep", "100000"]));
    daemon.ok(words(&["run", "-d"], "waited-for", &STUBBORN));
    let pid = daemon.inspect("steady")["pid"].clone();
    let waiting = daemon.cli(["wait", "waited-for"]).spawn();

    for offset in [HOUR, -HOUR, 0] {
        clock.set(offset);
        told(&clock, &daemon, "steady", "Up ");
        assert_eq!(daemon.ok(["exec", "steady", "echo", "here"]), "here");
        // A whole life in the other time: limits of time are not reached, and what waits does not wait for an hour.
        let output = daemon
            .cli(words(&["run", "--rm"], "short", &["sh", "-c", "exit 3"]))
            .in_time();
        assert_eq!(
            output.status.code(),
            Some(3),
            "{offset}: {}",
            text(&output.stderr)
        );
        assert_eq!(daemon.state("steady"), "running");
        assert_eq!(
            daemon.inspect("steady")["pid"],
            pid,
            "{offset}: it was started again"
        );
    }

    // In the middle of a start, and of a stop that has to wait for its end.
    clock.set(HOUR);
    let starting = daemon.cli(words(&["run", "-d"], "jumped", &STUBBORN)).spawn();
    wait_until("the start to begin", || {
        text(&daemon.cli(["inspect", "jumped"]).run().stdout).contains("\"starting\"")
    });
    clock.set(-HOUR);
    let output = starting.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    wait_until("it to be deaf to SIGTERM", || {
        daemon.ok(["logs", "jumped"]) == "deaf"
    });
    let stopping = daemon.cli(["stop", "-t", "3", "jumped"]).spawn();
    wait_until("the stop to begin", || daemon.state("jumped") == "stopping");
    clock.set(HOUR);
    let output = stopping.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    told(&clock, &daemon, "jumped", "Exited (137)");
    clock.set(-HOUR);
    told(&clock, &daemon, "jumped", "Exited (137)");

    // Who waits for the other VM still does, and gets its answer.
    daemon.ok(["exec", "waited-for", "touch", "/go"]);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "5\n");

    // A daemon that starts in another time finds the same processes.
    daemon.kill();
    clock.set(HOUR);
    daemon.start_again();
    wait_until("the agent to be found again", || {
        daemon.cli(["exec", "steady", "true"]).run().status.success()
    });
    assert_eq!(daemon.inspect("steady")["pid"], pid, "it was started again");
    told(&clock, &daemon, "steady", "Up ");
    daemon.finish();
}
