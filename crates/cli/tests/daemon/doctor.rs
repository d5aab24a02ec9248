//! `doctor`: its exit status, and what goes to which output.

use serde_json::{Value, json};

use crate::fake::{Fake, answer, lines, not_found, text};

fn finding(id: &str, severity: &str) -> Value {
    let well = severity == "ok";
    json!({"capability": "vmm", "id": id, "severity": severity, "message": format!("about {id}"),
        "cost": if well { "" } else { "something" }, "hint": if well { "" } else { "mend it" }})
}

#[test]
fn only_failures_count_for_the_exit_status() {
    for (severities, expected) in [
        (&["ok"][..], 0),
        (&["ok", "warning"], 0),
        (&["warning", "failure", "ok"], 1),
    ] {
        let findings: Vec<_> = severities.iter().map(|severity| finding("x", severity)).collect();
        let fake = Fake::start(move |line, _| match line {
            "GET /v1/system/doctor" => answer(200, &json!({"findings": findings})),
            _ => not_found("nothing"),
        });
        let table = fake.run(&["doctor"]);
        assert_eq!(table.status.code(), Some(expected), "{severities:?}");
        let shown = fake.run(&["doctor", "--output", "json"]);
        assert_eq!(shown.status.code(), Some(expected));
        let report: Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!(report["findings"].as_array().unwrap().len(), severities.len());
        assert_eq!(fake.requests(), ["GET /v1/system/doctor"; 2]);
    }
}

#[test]
fn a_fix_says_what_it_did_and_why_it_did_not_do_the_rest() {
    let fake = Fake::start(|line, _| match line {
        "POST /v1/system/doctor/fix" => lines(&[
            json!({"type": "progress", "progress": {"event": "message", "text": "hello"}}),
            json!({"type": "done", "result": {
                "fixes": [
                    {"fix": "tighten-modes", "done": ["changed the mode of /d from 0755 to 0710"]},
                    {"fix": "prepare-bases", "done": [], "failed": {"kind": "no-space", "message": "the disk is full",
                        "causes": [], "hints": ["run `offshoot prune`"]}},
                ],
                "findings": [finding("base-damaged", "warning")],
            }}),
        ]),
        _ => not_found("nothing"),
    });
    let output = fake.run(&["doctor", "--fix"]);
    assert_eq!(output.status.code(), Some(1), "a fix failed");
    insta::assert_snapshot!(text(&output.stdout), @r"
    mended: changed the mode of /d from 0755 to 0710

    vmm
      warning  about base-damaged [base-damaged]
               cost: something
               hint: mend it

    0 failures, 1 warning, 0 ok
    ");
    insta::assert_snapshot!(text(&output.stderr), @r"
    error: the disk is full
    hint: run `offshoot prune`
    ");
    let output = fake.run(&["doctor", "--fix", "--output", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["fixes"][1]["failed"]["kind"], "no-space");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_report_of_an_older_daemon_is_understood() {
    let fake = Fake::start(|_, _| {
        let old = json!({"capability": "vmm", "severity": "ok", "message": "qemu 7.2", "hint": ""});
        answer(200, &json!({"findings": [old]}))
    });
    let output = fake.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains("  ok       qemu 7.2\n"));
}
