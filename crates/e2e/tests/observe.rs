//! What happened to a VM, as events, numbers and log lines that speak of the same.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use offshoot_e2e::{Daemon, IMAGE, PATIENCE, Scrape, wait_until};
use serde_json::Value;

/// Head (in lower case) and body of an answer.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    let request = format!("{request} HTTP/1.1\r\nHost: offshoot\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

fn ask_socket(daemon: &Daemon, request: &str) -> (String, String) {
    let stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    ask(stream, request)
}

fn scrape(daemon: &Daemon) -> Scrape {
    let (head, body) = ask_socket(daemon, "GET /metrics");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    Scrape::parse(&body)
}

fn events_of(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn actions(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|event| event["action"].as_str().unwrap())
        .collect()
}

#[test]
fn a_life_shows_in_events_numbers_and_log() {
    let daemon = Daemon::start_with("metrics_listen = \"127.0.0.1:0\"");
    let before = scrape(&daemon);
    let mut live = daemon.cli(["events", "--output", "json"]).spawn();
    // It has its answer's head: from here on it misses nothing.
    wait_until("the follower to follow", || {
        daemon.log().contains("route=\"/v1/events\"")
    });

    daemon.ok(["run", "-d", "--name", "web", IMAGE, "sleep", "1000"]);
    let running = scrape(&daemon);
    daemon.ok(["pause", "web"]);
    daemon.ok(["resume", "web"]);
    daemon.ok(["stop", "-t", "1", "web"]);
    daemon.ok(["rename", "web", "site"]);

    // A start that fails: the folder that it shares went away.
    let shared = daemon.root().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let volume = format!("{}:/data", shared.display());
    daemon.ok(["create", "--name", "broken", "-v", &volume, IMAGE]);
    std::fs::remove_dir(&shared).unwrap();
    let (head, body) = ask_socket(&daemon, "POST /v1/vms/broken/start");
    assert!(!head.starts_with("http/1.1 2"), "{head}");
    let error: Value = serde_json::from_str(&body).unwrap();
    let failed = error["operation"].as_str().unwrap();
    assert!(
        head.contains(&format!("x-offshoot-operation: {failed}")),
        "{head}"
    );

    let id = daemon.inspect("site")["id"].as_str().unwrap().to_owned();
    daemon.ok(["rm", "site"]);
    daemon.ok(["rm", "broken"]);

    // Live: all of it, in order, as it happened.
    let mut seen = Vec::new();
    for line in BufReader::new(live.stdout.take().unwrap()).lines() {
        seen.push(line.unwrap());
        let last: Value = serde_json::from_str(seen.last().unwrap()).unwrap();
        if last["action"] == "remove" && last["vm_name"] == "broken" {
            break;
        }
    }
    live.kill().unwrap();
    live.wait().unwrap();
    let seen = events_of(&seen.join("\n"));
    assert!(seen.is_sorted_by_key(|event| event["seq"].as_u64()), "{seen:?}");
    let web: Vec<Value> = seen
        .iter()
        .filter(|event| event["vm_id"] == id.as_str())
        .cloned()
        .collect();
    let life = [
        "create", "start", "pause", "resume", "stop", "exit", "rename", "remove",
    ];
    assert_eq!(actions(&web), life);
    assert_eq!(web[0]["reason"], IMAGE);
    let how = web[5]["reason"].as_str().unwrap();
    assert!(how.starts_with("it was stopped, status "), "{how}");
    assert_eq!(web[6]["reason"], "was `web`");
    assert_eq!(
        (&web[5]["vm_name"], &web[6]["vm_name"]),
        (&"web".into(), &"site".into())
    );
    // What one request set off is one operation, and different requests are different ones.
    assert!(web.iter().all(|event| event["operation"].is_string()), "{web:?}");
    assert_eq!(web[4]["operation"], web[5]["operation"]);
    assert_ne!(web[1]["operation"], web[2]["operation"]);
    let broken: Vec<Value> = seen
        .iter()
        .filter(|event| event["vm_name"] == "broken")
        .cloned()
        .collect();
    assert_eq!(actions(&broken), ["create", "start-failed", "remove"]);
    assert_eq!(broken[1]["operation"], failed);

    // History: the same, and parts of it.
    let history = |arguments: &[&str]| {
        let all = [&["events", "--no-follow", "--output", "json"], arguments].concat();
        events_of(&daemon.ok(all))
    };
    let of_web = format!("vm={id}");
    assert_eq!(history(&["--filter", &of_web]), web);
    assert_eq!(history(&["--filter", "vm=broken"]), broken);
    let by_operation = format!("operation={failed}");
    assert_eq!(history(&["--filter", &by_operation]), broken[1..2]);
    assert_eq!(
        history(&[
            "--filter",
            &of_web,
            "--filter",
            "action=stop",
            "--filter",
            "action=exit"
        ]),
        web[4..6]
    );
    let since = web[5]["time_ms"].as_u64().unwrap();
    let seconds = format!("{}.{:03}", since / 1000, since % 1000);
    let late = history(&["--filter", &of_web, "--since", &seconds]);
    assert!(late.ends_with(&web[5..]), "{late:?}");
    assert!(
        late.iter().all(|event| event["time_ms"].as_u64() >= Some(since)),
        "{late:?}"
    );
    let early = history(&["--filter", &of_web, "--until", &seconds]);
    assert!(
        web.starts_with(&early) && !early.is_empty() && early.len() < 6,
        "{early:?}"
    );
    // What ended in the past ends, though nobody said not to follow.
    assert_eq!(daemon.ok(["events", "--since", "1h", "--until", "1h"]), "");
    let line = daemon.ok(["events", "--no-follow", "--filter", &by_operation]);
    assert!(
        line.contains(" start-failed broken (") && line.contains(&format!("[{failed}]")),
        "{line}"
    );

    // The log speaks of the same operation.
    let log = daemon.log();
    let told = |words: &str| {
        log.lines()
            .any(|line| line.contains(&format!("op={failed}")) && line.contains(words))
    };
    assert!(
        told("start-failed") && told("path=\"/v1/vms/broken/start\""),
        "{failed}"
    );
    let started = web[1]["operation"].as_str().unwrap();
    let stages = log
        .lines()
        .filter(|line| line.contains(&format!("op={started}")) && line.contains(" stage "));
    assert!(stages.count() > 5, "the stages of {started} are not in the log");

    // Numbers moved with it.
    let after = scrape(&daemon);
    let moved = |name: &str, labels: &[(&str, &str)]| after.value(name, labels) - before.value(name, labels);
    for (name, labels, by) in [
        ("offshoot_events_total", &[("action", "create")][..], 2.0),
        ("offshoot_events_total", &[("action", "pause")], 1.0),
        ("offshoot_events_total", &[("action", "start-failed")], 1.0),
        ("offshoot_exits_total", &[("reason", "stopped")], 1.0),
        (
            "offshoot_operations_total",
            &[("operation", "create"), ("outcome", "done")],
            2.0,
        ),
        (
            "offshoot_operations_total",
            &[("operation", "start"), ("outcome", "done")],
            1.0,
        ),
        (
            "offshoot_operations_total",
            &[("operation", "remove"), ("outcome", "done")],
            2.0,
        ),
        (
            "offshoot_operation_duration_seconds_count",
            &[("operation", "stop")],
            1.0,
        ),
        (
            "offshoot_stage_duration_seconds_count",
            &[("operation", "start"), ("stage", "agent.after_boot")],
            1.0,
        ),
        (
            "offshoot_api_requests_total",
            &[
                ("route", "/v1/vms/{vm}/pause"),
                ("method", "POST"),
                ("status", "200"),
            ],
            1.0,
        ),
        (
            "offshoot_api_requests_total",
            &[("route", "/v1/vms/{vm}"), ("method", "DELETE"), ("status", "204")],
            2.0,
        ),
    ] {
        assert!(
            (moved(name, labels) - by).abs() < 1e-9,
            "{name}{labels:?} moved by {}",
            moved(name, labels)
        );
    }
    let state = |scrape: &Scrape, state| scrape.value("offshoot_vms", &[("state", state)]);
    assert!((state(&running, "running") - 1.0).abs() < 1e-9);
    assert!(state(&after, "running").abs() < 1e-9);
    let share = |scrape: &Scrape, name| scrape.value(name, &[]);
    assert!(share(&after, "process_resident_memory_bytes") > 1e6);
    assert!(share(&after, "offshoot_images") >= 1.0);
    assert!(after.value("offshoot_storage_bytes", &[("kind", "bases")]) > 1e6);
    assert!(share(&after, "offshoot_dedup_ratio") > 0.0);
    // No series is one VM's.
    let values = after.label_values();
    let names = ["web", "site", "broken", id.as_str()];
    assert!(
        names
            .iter()
            .all(|name| !values.iter().any(|value| value.contains(name))),
        "{values:?}"
    );

    // The same over TCP, and nothing else there.
    let log = daemon.log();
    let (_, rest) = log.split_once("metrics address=").unwrap();
    let address = rest.split_whitespace().next().unwrap();
    let tcp = |request: &str| ask(TcpStream::connect(address).unwrap(), request);
    assert_eq!(Scrape::parse(&tcp("GET /metrics").1).names(), after.names());
    assert!(tcp("GET /v1/vms").0.starts_with("http/1.1 404"));
    daemon.finish();
}
