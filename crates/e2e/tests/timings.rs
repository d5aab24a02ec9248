//! Where the time went: what the log says of every stage is what the database keeps and what the API and the CLI tell.

use std::collections::BTreeSet;

use offshoot_e2e::{Daemon, IMAGE, tar_of, text};
use serde_json::Value;

/// Operation's id, kind, stage, start and time.
type Stage = (String, String, String, u64, u64);

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn word(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no word"))
        .to_owned()
}

/// Every stage in the log, each in a line of its own.
fn logged(log: &str) -> BTreeSet<Stage> {
    // `… stage op=1a2b3c4d operation="start" stage="root.prepare" outcome=Done start_us=3 us=12`
    let of_line = |line: &str| -> Option<Stage> {
        let (_, fields) = line.split_once(" stage op=")?;
        let (id, _) = fields.split_once(' ')?;
        let quoted = |name: &str| {
            let (_, rest) = fields.split_once(&format!(" {name}=\""))?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        let number = |name: &str| {
            let (_, rest) = fields.split_once(&format!(" {name}="))?;
            rest.split(' ').next()?.parse().ok()
        };
        let (operation, stage) = (quoted("operation")?, quoted("stage")?);
        Some((
            id.to_owned(),
            operation,
            stage,
            number("start_us")?,
            number("us")?,
        ))
    };
    log.lines().filter_map(of_line).collect()
}

/// Every stage that the API tells.
fn told(operations: &[Value]) -> BTreeSet<Stage> {
    let stages = operations.iter().flat_map(|operation| {
        list(&operation["stages"]).iter().map(|stage| {
            (
                word(&operation["operation"]),
                word(&operation["kind"]),
                word(&stage["stage"]),
                number(&stage["start_us"]),
                number(&stage["duration_us"]),
            )
        })
    });
    stages.collect()
}

/// A stage lies within its operation; those that follow one another take no longer together than it.
fn check_sums(operation: &Value) {
    let (stages, whole) = (list(&operation["stages"]), number(&operation["duration_us"]));
    let mut sum = 0;
    for stage in stages {
        let end = number(&stage["start_us"]) + number(&stage["duration_us"]);
        // Each number is rounded down for itself.
        assert!(end <= whole + 2, "{stage} ends after its operation: {operation}");
        match stage["within"].as_str() {
            None => sum += number(&stage["duration_us"]),
            Some(parent) => assert!(stages.iter().any(|other| other["stage"] == parent), "{operation}"),
        }
    }
    assert!(sum <= whole, "{sum} µs of stages in {operation}");
}

#[test]
fn every_stage_in_the_log_is_kept_and_told() {
    let daemon = Daemon::start();
    // What an earlier daemon did to this data directory is in no log of ours.
    let earlier = daemon.get_json("/v1/operations?limit=1000");
    let earlier: BTreeSet<_> = told(list(&earlier)).into_iter().map(|stage| stage.0).collect();
    let archive = daemon.root().join("small.tar");
    tar_of(&archive, |root| {
        std::fs::create_dir_all(root.join("bin")).unwrap();
    });
    daemon.ok([
        "image",
        "import",
        "--name",
        "small:latest",
        &archive.display().to_string(),
    ]);
    // No kernel, and told all the same.
    daemon
        .cli(["kernel", "add", "--vmlinux", &archive.display().to_string()])
        .fails(1);
    daemon.ok(["image", "prepare", "--force", IMAGE]);
    daemon.ok(["create", "--name", "web", IMAGE, "sleep", "1000"]);
    for command in [
        &["start", "web"][..],
        &["pause", "web"],
        &["resume", "web"],
        &["restart", "-t", "1", "web"],
        &["rename", "web", "site"],
        &["stop", "-t", "1", "site"],
        &["reset", "site"],
    ] {
        daemon.ok(command);
    }
    let id = word(&daemon.inspect("site")["id"]);
    let drawn = daemon.ok(["inspect", "--timings", "site"]);
    for words in ["create ", "reset ", "restart"] {
        // A restart is a stop and a start under one id.
        assert_eq!(drawn.contains(words), words != "restart", "{drawn}");
    }
    daemon.ok(["rm", "site"]);

    let operations = daemon.get_json("/v1/operations?limit=1000");
    let mut operations = list(&operations).to_vec();
    operations.retain(|operation| !earlier.contains(&word(&operation["operation"])));
    let kinds: BTreeSet<_> = operations
        .iter()
        .map(|operation| word(&operation["kind"]))
        .collect();
    for kind in [
        "import",
        "prepare",
        "kernel-add",
        "create",
        "start",
        "pause",
        "resume",
        "stop",
        "rename",
        "reset",
        "remove",
    ] {
        assert!(kinds.contains(kind), "no {kind} among {kinds:?}");
    }
    operations.iter().for_each(check_sums);
    let of_api = told(&operations);
    assert_eq!(logged(&daemon.log()), of_api, "the log and the API");
    let mut kept: BTreeSet<_> = daemon.database().stages().into_iter().collect();
    kept.retain(|stage| !earlier.contains(&stage.0));
    assert_eq!(kept, of_api, "the database and the API");

    // A VM that is gone is known by its id.
    let of_vm = daemon.get_json(&format!("/v1/operations?vm={id}"));
    let of_vm = list(&of_vm);
    assert!(of_vm.iter().all(|operation| operation["vm_id"] == id.as_str()));
    assert_eq!(word(&of_vm[0]["kind"]), "create");
    assert_eq!(word(&of_vm[of_vm.len() - 1]["kind"]), "remove");
    let restart = of_vm
        .iter()
        .rfind(|operation| operation["kind"] == "start")
        .unwrap();
    let same_id = daemon.get_json(&format!(
        "/v1/operations?operation={}",
        word(&restart["operation"])
    ));
    let kinds: Vec<_> = list(&same_id)
        .iter()
        .map(|operation| word(&operation["kind"]))
        .collect();
    assert_eq!(kinds, ["stop", "start"], "a restart is one operation");
    let boot = list(&restart["stages"])
        .iter()
        .find(|stage| stage["stage"] == "guest.boot")
        .unwrap();
    assert_eq!(boot["within"], "agent.after_boot");
    let starts = daemon.ok(["system", "timings", "--kind", "start", "--output", "json"]);
    let starts: Value = serde_json::from_str(&starts).unwrap();
    assert_eq!(list(&starts).len(), 2);
    daemon.finish();
}

#[test]
fn a_run_tells_where_its_time_went() {
    let daemon = Daemon::start();
    let output = daemon
        .cli(["run", "--rm", "--timings=json", IMAGE, "echo", "hello"])
        .run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "hello\n", "the timings are no output");
    let run: Value = serde_json::from_str(&text(&output.stderr)).expect("JSON");
    let stages: Vec<_> = list(&run["stages"])
        .iter()
        .map(|stage| word(&stage["stage"]))
        .collect();
    assert_eq!(stages, ["image", "create", "attach", "start", "main", "removal"]);
    let whole = number(&run["duration_us"]);
    let sum: u64 = list(&run["stages"])
        .iter()
        .map(|stage| number(&stage["duration_us"]))
        .sum();
    assert!(
        sum <= whole && sum > whole * 9 / 10,
        "{sum} of {whole} µs are accounted for"
    );
    assert!(number(&run["first_output_us"]) <= whole);
    let kinds: Vec<_> = list(&run["operations"])
        .iter()
        .map(|operation| word(&operation["kind"]))
        .collect();
    assert_eq!(
        kinds,
        ["create", "start", "run", "stop", "remove"],
        "also of a VM that is gone"
    );

    let output = daemon
        .cli(["run", "-d", "--name", "web", "--timings", IMAGE, "sleep", "1000"])
        .run();
    let drawn = text(&output.stderr);
    for words in ["offshootd create", "offshootd start", "guest.boot", "█"] {
        assert!(drawn.contains(words), "no {words} in {drawn}");
    }
    daemon.finish();
}

#[test]
fn timings_are_written_before_the_daemon_ends() {
    let mut daemon = Daemon::start();
    daemon.ok(["create", "--name", "web", IMAGE, "true"]);
    assert!(daemon.terminate().success());
    let kinds: BTreeSet<_> = daemon
        .database()
        .stages()
        .into_iter()
        .map(|stage| stage.1)
        .collect();
    assert!(kinds.contains("create"), "{kinds:?}");
    daemon.start_again();
    let timings = daemon.inspect("web")["timings"].clone();
    assert!(
        list(&timings).iter().any(|stage| stage["stage"] == "row"),
        "{timings}"
    );
    daemon.finish();
}
