//! The first preparation of an image: once for all who ask, and nothing half-made whenever it is killed.

use std::process::{Command, Stdio};
use std::time::Instant;

use offshoot_e2e::{Daemon, IMAGE, Random, after, bin_dir, names, tell, text};

/// Emulated guests that all boot at once take turns on the processors.
const PATIENT: &str = "boot_timeout_s = 900";

/// Clients that start VMs at the same time, and how many each starts.
const CLIENTS: usize = 2;
const RUNS: usize = 16;

#[test]
fn many_first_runs_prepare_once() {
    let daemon = Daemon::start_unprepared(PATIENT);
    assert_eq!(names(&daemon.data().join("bases")), [""; 0]);
    let script = format!(
        "runs=; for n in $(seq {RUNS}); do {} run --rm --memory 128m {IMAGE} echo done & runs=\"$runs $!\"; done
         for run in $runs; do wait $run || exit 1; done",
        bin_dir().join("offshoot").display()
    );
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            Command::new("sh")
                .args(["-c", &script])
                .env("OFFSHOOT_SOCKET", daemon.socket())
                .env("HOME", daemon.root())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for client in clients {
        let output = client.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "done\n".repeat(RUNS));
    }
    assert_eq!(daemon.preparations(), 1, "the base was prepared more than once");
    assert_eq!(names(&daemon.data().join("bases")).len(), 1);
    daemon.ok(["image", "verify", IMAGE]);
    daemon.finish();
}

/// Points in time at which a preparation is killed.
const KILLS: u32 = 20;

#[test]
fn a_killed_preparation_leaves_nothing() {
    let mut random = Random::seeded();
    let mut daemon = Daemon::start_unprepared(PATIENT);
    let began = Instant::now();
    daemon.ok(["image", "prepare", IMAGE]);
    let undisturbed = began.elapsed();
    let bases = daemon.data().join("bases");
    let (mut too_late, mut in_time) = (0, 0);
    for n in 0..KILLS {
        daemon.forget_bases();
        let prepared_before = daemon.preparations();
        let delay = undisturbed.mul_f64((f64::from(n) + random.fraction()) / f64::from(KILLS));
        let client = daemon.cli(["image", "prepare", IMAGE]).spawn();
        after(delay);
        daemon.kill_with_children();
        let client = client.wait_with_output().unwrap();
        let whole = daemon.preparations() > prepared_before;
        if whole {
            too_late += 1;
        } else {
            in_time += 1;
            assert!(
                !client.status.success(),
                "killed after {delay:?}, and all is well"
            );
        }
        // A base that was published before the daemon could say so is as good as any other.
        assert!(names(&bases).len() <= 1, "{:?}", names(&bases));
        let survived = names(&bases).len() == 1;

        daemon.start_again();
        assert_eq!(
            names(&daemon.data().join("tmp")),
            [""; 0],
            "killed after {delay:?}: unpublished work is left"
        );
        if survived {
            daemon.ok(["image", "verify", IMAGE]);
        } else {
            assert!(
                !whole,
                "killed after {delay:?}: a base that was announced is gone"
            );
        }
        assert_eq!(
            daemon.ok(["run", "--rm", "--memory", "256m", IMAGE, "echo", "works"]),
            "works",
            "killed after {delay:?}"
        );
        assert_eq!(names(&bases).len(), 1);
    }
    tell(&format!(
        "a preparation of {undisturbed:?} was killed {in_time} times, and {too_late} times it was over before"
    ));
    assert!(
        in_time >= KILLS / 2,
        "only {in_time} of {KILLS} kills hit a preparation"
    );
    daemon.ok(["image", "verify", IMAGE]);
    daemon.finish();
}
