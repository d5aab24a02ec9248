//! The OpenAPI document is true: schemathesis asks whatever it allows, and much that it does not, and every answer is one
//! that the document has; none is the daemon's fault.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use offshoot_e2e::{Daemon, Forwarder, IMAGE, text, wait_until};
use serde_json::Value;

/// What an answer is checked for.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
    response_schema_conformance,unsupported_method,allow_header_conformance";

/// `METHOD path` of everything in the document.
fn operations(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().expect("paths");
    let named = |(path, item): (&String, &Value)| {
        let methods: Vec<_> = item.as_object().expect("an item").keys().cloned().collect();
        let path = path.clone();
        methods
            .into_iter()
            .filter(|method| ["get", "put", "post", "delete", "patch"].contains(&method.as_str()))
            .map(move |method| format!("{} {path}", method.to_uppercase()))
    };
    paths.iter().flat_map(named).collect()
}

#[test]
fn schemathesis_finds_no_answer_that_the_document_does_not_have() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "asked", IMAGE, "true"]);
    wait_until("the VM to be stopped", || daemon.state("asked") == "stopped");
    let vm = daemon.inspect("asked")["id"].as_str().expect("an id").to_owned();
    let port = Forwarder::start(&daemon.socket());
    let pid = daemon.pid();

    let report = daemon.root().join("report.xml");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/schemathesis");
    // One worker: CPython 3.11 can fail to parse code in two threads at once (python/cpython#106905), and hypothesis does.
    let run = Command::new(script)
        .arg("run")
        .arg(format!("{}/openapi.json", port.url()))
        .args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing"])
        .args([
            "--max-examples",
            "10",
            "--workers",
            "1",
            "--generation-deterministic",
        ])
        .args(["--request-timeout", "60", "--no-color", "--continue-on-failure"])
        .args(["--suppress-health-check", "all"])
        // It finds the daemon's pid in another answer, and ends it.
        .args(["--exclude-path", "/v1/system/shutdown"])
        .args(["--report", "junit", "--report-junit-path"])
        .arg(&report)
        .current_dir(daemon.root())
        .env("OFFSHOOT_TEST_VM", &vm)
        .env("OFFSHOOT_TEST_VM_NAME", "asked")
        .env("OFFSHOOT_TEST_IMAGE", IMAGE)
        .output()
        .expect("scripts/schemathesis");
    let said = format!("{}\n{}", text(&run.stdout), text(&run.stderr));
    offshoot_e2e::tell(&said);
    assert!(run.status.success(), "schemathesis: {}", run.status);

    // It has asked for everything, the VM lives on, and so does the daemon.
    let document = daemon.get("/openapi.json").json();
    let report = std::fs::read_to_string(report).expect("a report");
    let missing: Vec<_> = operations(&document)
        .into_iter()
        .filter(|operation| !report.contains(&format!("\"{operation}\"")))
        .collect();
    assert_eq!(missing, ["POST /v1/system/shutdown"], "nobody asked for these");
    assert_eq!(daemon.pid(), pid);
    assert_eq!(daemon.state(&vm), "stopped");
    let log = daemon.log();
    assert!(!log.contains("panicked"), "the daemon panicked");
    daemon.finish();
}
