//! A daemon that dies at any stage of a VM's life leaves a VM that is wholly there or wholly gone, and nothing else.
//!
//! The stages are those that the daemon itself logs in a life that goes well: a new one is covered without anyone
//! remembering. In `make test` the VMM is the fake, which makes two hundred crashes cheap; `make soak` does the same with
//! real guests.

use std::collections::BTreeSet;

use offshoot_e2e::{Daemon, IMAGE, names, tell, text, wait_until};

/// The operations whose stages are crashed in.
const OPERATIONS: [&str; 4] = ["create", "start", "stop", "remove"];
/// The VM.
const VM: &str = "crash";

/// One place to die at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Point {
    operation: String,
    stage: String,
    when: &'static str,
}

impl Point {
    fn text(&self) -> String {
        format!("{}/{}/{}", self.operation, self.stage, self.when)
    }
}

/// The commands of a life, in order. One fails when the daemon dies in it.
fn life(share: &str) -> Vec<Vec<String>> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    vec![
        words(&format!(
            "create --name {VM} -v {share}:/share {IMAGE} sleep 1000"
        )),
        words(&format!("start {VM}")),
        words(&format!("stop -t 5 {VM}")),
        words(&format!("rm {VM}")),
    ]
}

/// Every stage in the log, once, in the order they first came.
fn stages(log: &str) -> Vec<(String, String)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in log.lines() {
        // `… stage op=1a2b3c4d operation="start" stage="root.prepare" outcome=Done start_us=3 us=12`
        // What is a part of a stage has a `within`, and no point of its own.
        if line.contains(" within=\"") {
            continue;
        }
        let field = |name: &str| {
            let start = line.find(&format!(" {name}=\""))? + name.len() + 3;
            let length = line[start..].find('"')?;
            Some(line[start..start + length].to_owned())
        };
        if let (Some(operation), Some(stage)) = (field("operation"), field("stage"))
            && OPERATIONS.contains(&operation.as_str())
            && seen.insert((operation.clone(), stage.clone()))
        {
            found.push((operation, stage));
        }
    }
    found
}

fn points(log: &str) -> Vec<Point> {
    stages(log)
        .into_iter()
        .flat_map(|(operation, stage)| {
            ["before", "after"].map(|when| Point {
                operation: operation.clone(),
                stage: stage.clone(),
                when,
            })
        })
        .collect()
}

/// Lives a life with a daemon that dies at `point`, then looks at what the next daemon makes of it.
fn crash_at(daemon: &mut Daemon, share: &str, point: &Point) {
    let text_of_point = point.text();
    daemon.kill();
    daemon.start_again_with(&[("OFFSHOOT_FAIL_POINT", text_of_point.as_str())]);
    for command in life(share) {
        let output = daemon.cli(&command).run();
        if !output.status.success() {
            // It fails because the daemon is gone, and for no other reason.
            wait_until(
                &format!(
                    "the daemon to die at {text_of_point}, not {}",
                    text(&output.stderr)
                ),
                || daemon.has_ended(),
            );
            break;
        }
    }
    daemon.wait_ended();
    daemon.start_again();

    // Wholly there: it comes to rest in a state from which it works. Wholly gone: nothing of it is left.
    wait_until(&format!("a state of rest after {text_of_point}"), || {
        let states = daemon.ok(["ps", "-a", "--output", "json"]);
        !["starting", "stopping"]
            .iter()
            .any(|state| states.contains(&format!("\"state\": \"{state}\"")))
            && (daemon.vmms().is_empty() || states.contains("\"state\": \"running\""))
    });
    if point.operation == "remove" {
        // A removal that was announced is finished.
        wait_until(&format!("the removal after {text_of_point}"), || {
            daemon.ok(["ps", "-aq"]).is_empty()
        });
    }
    if daemon.ok(["ps", "-aq"]).is_empty() {
        assert_eq!(names(&daemon.data().join("vms")), [""; 0], "{text_of_point}");
        assert_eq!(names(&daemon.root().join("run/vms")), [""; 0], "{text_of_point}");
        assert_eq!(
            (daemon.vmms().len(), daemon.virtiofsds().len()),
            (0, 0),
            "{text_of_point}"
        );
        return;
    }
    if daemon.state(VM) == "running" {
        assert_eq!(daemon.vmms().len(), 1, "{text_of_point}");
        daemon.ok(["exec", VM, "true"]);
    } else {
        assert_eq!(
            (daemon.vmms().len(), daemon.virtiofsds().len()),
            (0, 0),
            "{text_of_point}"
        );
        assert_eq!(names(&daemon.root().join("run/vms")), [""; 0], "{text_of_point}");
        daemon.ok(["start", VM]);
        daemon.ok(["exec", VM, "true"]);
    }
    daemon.ok(["rm", "-f", VM]);
}

fn crash_everywhere(mut daemon: Daemon) {
    let share = daemon.root().join("share");
    std::fs::create_dir(&share).expect("a folder");
    let share = share.display().to_string();
    for command in life(&share) {
        daemon.ok(&command);
    }
    let points = points(&daemon.log());
    for operation in OPERATIONS {
        assert!(
            points.iter().any(|point| point.operation == operation),
            "no stage of {operation} was found in the log"
        );
    }
    tell(&format!("{} points", points.len()));
    for point in &points {
        crash_at(&mut daemon, &share, point);
    }
    daemon.finish();
}

#[test]
fn a_daemon_that_dies_at_any_stage_leaves_whole_vms_and_nothing_else() {
    crash_everywhere(Daemon::start_fake(""));
}

/// The same with real guests: five minutes.
#[test]
#[ignore = "takes five minutes; `make soak` runs it"]
fn a_daemon_that_dies_at_any_stage_leaves_whole_real_vms() {
    crash_everywhere(Daemon::start());
}
