//! `bench create` with real VMs: what it says holds, and it leaves nothing, however it ends.

use std::io::{BufRead as _, BufReader};
use std::path::Path;

use offshoot_e2e::{Daemon, IMAGE, signal, text};
use rustix::process::Signal;
use serde_json::Value;

/// The stages that every VM has in whatever way it starts.
const STAGES: [(&str, &str); 5] = [
    ("create", "network"),
    ("create", "row"),
    ("start", "vmm.prepare"),
    ("start", "agent.after_boot"),
    ("start", "main.after_boot"),
];

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

/// Everything that holds for a VM that answered.
fn check_sample(sample: &Value) {
    let at = |name: &str| number(&sample[name]);
    let order = [at("created_us"), at("running_us"), at("exec_us"), at("ssh_us")];
    assert!(order[0] > 0 && order.is_sorted(), "{sample}");
    for (operation, stage) in STAGES {
        let operations = list(&sample["operations"]).iter();
        let found = operations
            .filter(|found| found["kind"] == operation)
            .flat_map(|found| list(&found["stages"]))
            .any(|found| found["stage"] == stage && found["outcome"] == "done");
        assert!(found, "no {operation} {stage} in {sample}");
    }
    for operation in list(&sample["operations"]) {
        // The daemon's own times lie within those that its client saw.
        let (began, took) = (number(&operation["began_us"]), number(&operation["duration_us"]));
        assert!(began >= at("began_us"), "{sample}");
        assert!(began + took <= at("began_us") + at("exec_us"), "{sample}");
    }
    assert_eq!(
        (&sample["vmm"], &sample["root"]),
        (&"qemu".into(), &"block".into())
    );
    assert_eq!(sample["boot"], "cold");
}

fn check_picture(path: &Path, samples: usize) {
    let picture = std::fs::read_to_string(path).expect("the picture");
    let document = roxmltree::Document::parse(&picture).expect("XML");
    assert_eq!(document.root_element().tag_name().name(), "svg");
    let bars = document.descendants().filter(|node| {
        node.text()
            .is_some_and(|text| text.starts_with("start agent") || text.starts_with("start guest.boot"))
    });
    assert!(bars.count() > samples, "a bar for each VM, and one in the legend");
}

#[test]
fn a_benchmark_counts_what_it_made_and_leaves_nothing() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "bench-mine", IMAGE, "true"]);
    let picture = daemon.root().join("bench.svg");
    let svg = picture.display().to_string();
    let words = [
        &[
            "bench",
            "create",
            "--image",
            IMAGE,
            "--runs",
            "3",
            "--parallel",
            "2",
            "--ssh",
        ][..],
        &[
            "--boot", "cold", "--root", "block", "--memory", "256m", "--output", "json",
        ],
        &["--svg", &svg],
    ];
    let output = daemon.ok(words.concat());
    let report: Value = serde_json::from_str(&output).expect("JSON");
    assert_eq!(
        (&report["format"], &report["version"]),
        (&"offshoot-bench-create".into(), &1.into())
    );
    let samples = list(&report["samples"]);
    assert_eq!(samples.len(), 3, "the warm-up does not count");
    samples.iter().for_each(check_sample);
    let runs: Vec<_> = samples.iter().map(|sample| number(&sample["run"])).collect();
    assert_eq!(runs, [1, 2, 3]);
    assert_eq!(
        (list(&report["failures"]).len(), &report["interrupted"]),
        (0, &false.into())
    );
    let longest = samples.iter().map(|sample| number(&sample["ssh_us"])).max();
    assert!(Some(number(&report["wall_us"])) >= longest, "{report}");

    let [variant] = list(&report["variants"]) else {
        panic!("one variant: {report}");
    };
    for (name, field) in [
        ("created", "created_us"),
        ("running", "running_us"),
        ("exec", "exec_us"),
        ("ssh", "ssh_us"),
    ] {
        let mut measures: Vec<_> = samples.iter().map(|sample| number(&sample[field])).collect();
        measures.sort_unstable();
        let spread = &variant[name];
        assert_eq!(number(&spread["n"]), 3);
        let told = ["min_us", "p50_us", "p90_us", "p99_us", "max_us"].map(|field| number(&spread[field]));
        assert_eq!(
            told,
            [measures[0], measures[1], measures[2], measures[2], measures[2]]
        );
    }
    assert!(
        list(&variant["stages"])
            .iter()
            .all(|stage| number(&stage["n"]) == 3),
        "{variant}"
    );
    check_picture(&picture, 3);

    let left: Value = serde_json::from_str(&daemon.ok(["ps", "-a", "--output", "json"])).unwrap();
    let left: Vec<_> = list(&left)
        .iter()
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    assert_eq!(left, ["bench-mine"], "what is not the benchmark's stays");
    daemon.finish();
}

#[test]
fn a_vm_that_fails_is_counted_and_told() {
    let daemon = Daemon::start();
    let output = daemon
        .cli([
            "bench", "create", "--runs", "2", "--warmup", "0", "--memory", "1m", "--output", "json",
        ])
        .run();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_str(&text(&output.stdout)).expect("JSON");
    assert_eq!(
        (list(&report["samples"]).len(), list(&report["failures"]).len()),
        (0, 2)
    );
    assert_eq!(report["failures"][0]["step"], "create");
    assert_eq!(report["variants"][0]["failed"], 2);
    assert!(report["variants"][0]["exec"].is_null());
    let warm = daemon.cli(["bench", "create", "--memory", "1m"]).fails(1);
    assert!(warm.contains("the warm-up"), "{warm}");
    daemon
        .cli(["bench", "create", "--image", "nothing:here"])
        .fails(1);
    assert_eq!(daemon.ok(["ps", "-aq"]), "");
    daemon.finish();
}

#[test]
fn ctrl_c_leaves_nothing() {
    let daemon = Daemon::start();
    let mut bench = daemon
        .cli([
            "bench",
            "create",
            "--runs",
            "100",
            "--parallel",
            "2",
            "--warmup",
            "0",
            "--hold",
            "--memory",
            "256m",
        ])
        .spawn();
    // Some are measured and held, some are on their way.
    let stderr = BufReader::new(bench.stderr.take().expect("piped"));
    let mut lines = stderr.lines();
    let first = lines
        .by_ref()
        .map(|line| line.expect("text"))
        .find(|line| line.contains(" of 100"));
    assert_eq!(first.as_deref(), Some("1 of 100"));
    signal(bench.id().cast_signed(), Signal::INT);
    let rest: Vec<_> = lines.map(|line| line.expect("text")).collect();
    let output = bench.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    let table = text(&output.stdout);
    assert!(
        table.contains("interrupted"),
        "what was measured is told: {table}"
    );
    assert_eq!(daemon.ok(["ps", "-aq"]), "", "{rest:?}");
    assert_eq!(daemon.vmms().len(), 0);
    daemon.finish();
}
