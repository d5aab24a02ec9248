//! Every request body against the API descriptions of the VMMs themselves, where somebody has them:
//! `OFFSHOOT_FIRECRACKER_API` names a `firecracker.yaml`, `OFFSHOOT_CLOUD_HYPERVISOR_API` a `cloud-hypervisor.yaml`, of any
//! version that is driven.

use std::path::{Path, PathBuf};

use offshoot_model::{ByteSize, Mac, VmId};
use offshoot_vmm::cloud_hypervisor::{ResizeDisk, Snapshot};
use offshoot_vmm::firecracker::{
    Action, ActionType, DrivePath, FirecrackerFacts, SnapshotCreate, VmState, requests, restore,
};
use offshoot_vmm::plan::{
    Accel, AgentChannel, ConsoleDevice, DiskPlan, LaunchPlan, NetBackend, NetPlan, Origin, PmemPlan,
};
use serde_json::{Value, json};

/// Whether `value` is what a schema (JSON Schema as OpenAPI and Swagger have it) describes. Fields that it does not name
/// are errors: the VMMs refuse them.
fn valid(description: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let named = description.pointer(reference.trim_start_matches('#'));
        return valid(description, named.ok_or(format!("no {reference}"))?, value, at);
    }
    let fail = |why: String| Err(format!("{at}: {why}"));
    let right = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_u64() || value.is_i64(),
        _ => return fail(format!("a type that is not understood: {}", schema["type"])),
    };
    if !right {
        return fail(format!("{value} is no {}", schema["type"]));
    }
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        return fail(format!("{value} is none of {words:?}"));
    }
    let bound = |key: &str| schema[key].as_i64();
    if let Some(number) = value.as_i64()
        && (bound("minimum").is_some_and(|least| number < least)
            || bound("maximum").is_some_and(|most| number > most))
    {
        return fail(format!("{number} is out of bounds"));
    }
    for required in schema["required"].as_array().into_iter().flatten() {
        if value.get(required.as_str().unwrap_or_default()).is_none() {
            return fail(format!("{required} is missing"));
        }
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let Some(schema) = schema["properties"].get(key) else {
            return fail(format!("there is no {key}"));
        };
        valid(description, schema, value, &format!("{at}.{key}"))?;
    }
    Ok(())
}

/// Whether a request is one that a description has.
fn allowed(description: &Value, verb: &str, path: &str, body: &Value) -> Result<(), String> {
    let fits = |template: &str| {
        let (ours, theirs): (Vec<_>, Vec<_>) = (path.split('/').collect(), template.split('/').collect());
        ours.len() == theirs.len()
            && ours
                .iter()
                .zip(&theirs)
                .all(|(a, b)| a == b || b.starts_with('{'))
    };
    let paths = description["paths"].as_object().ok_or("no paths")?;
    let found = paths
        .iter()
        .find(|(template, verbs)| fits(template) && verbs.get(verb).is_some());
    let (_, verbs) = found.ok_or(format!("no {verb} {path}"))?;
    let operation = &verbs[verb];
    let mut parameters = operation["parameters"].as_array().into_iter().flatten();
    let swagger = parameters.find(|parameter| parameter["in"] == "body");
    let schema = match swagger {
        Some(body) => &body["schema"],
        None => &operation["requestBody"]["content"]["application/json"]["schema"],
    };
    valid(description, schema, body, &format!("{verb} {path}"))
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn description(variable: &str) -> Option<Value> {
    let Some(path) = std::env::var_os(variable).map(PathBuf::from) else {
        eprintln!("SKIPPED: {variable} names no API description");
        return None;
    };
    let text = std::fs::read_to_string(path).unwrap();
    Some(serde_norway::from_str(&text).unwrap())
}

fn plan() -> LaunchPlan {
    let disk = |serial: &str, read_only| DiskPlan {
        serial: serial.into(),
        path: format!("/d/{serial}").into(),
        read_only,
    };
    LaunchPlan {
        origin: Origin::Kernel,
        vm: VmId::from_bytes(&[7; 6]),
        run_dir: "/run/x".into(),
        log: "/l".into(),
        console: "/c".into(),
        cpus: 2,
        memory: ByteSize::from_mib(256),
        accel: Accel::Kvm,
        kernel: "/k/vmlinux".into(),
        initramfs: Some("/k/initramfs".into()),
        cmdline: vec!["quiet".into()],
        console_device: ConsoleDevice::Serial,
        disks: vec![disk("root", true), disk("over-lay", false)],
        pmems: Vec::new(),
        shares: Vec::new(),
        nets: vec![NetPlan {
            backend: NetBackend::Tap("tap0".into()),
            mac: Mac([2, 0, 0, 0, 0, 1]),
        }],
        agent: AgentChannel::HybridVsock { cid: 3, port: 1024 },
        identity: None,
        cgroups: Vec::new(),
    }
}

#[test]
fn every_request_to_firecracker_is_one_of_its_own() {
    let Some(description) = description("OFFSHOOT_FIRECRACKER_API") else {
        return;
    };
    let version = description["info"]["version"].as_str().unwrap().to_owned();
    let said = format!("Firecracker v{}", version.trim_end_matches("-dev"));
    let facts = FirecrackerFacts::read(Path::new("/fc"), &said).unwrap();
    let mut plan = plan();
    if facts.pmem {
        plan.pmems.push(PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_mib(2),
            read_only: true,
        });
    }
    let list = requests(&plan, &facts, &["tap0".into()]).unwrap();
    let mut asked: Vec<_> = list
        .into_iter()
        .map(|request| ("put", request.path, request.body))
        .collect();
    let drive = DrivePath {
        drive_id: "root".into(),
        path_on_host: "/d".into(),
    };
    asked.push((
        "patch",
        "/drives/root".into(),
        serde_json::to_value(drive).unwrap(),
    ));
    for action_type in [ActionType::InstanceStart, ActionType::SendCtrlAltDel] {
        let action = serde_json::to_value(Action { action_type }).unwrap();
        asked.push(("put", "/actions".into(), action));
    }
    for state in ["Paused", "Resumed"] {
        let state = serde_json::to_value(VmState { state }).unwrap();
        asked.push(("patch", "/vm".into(), state));
    }
    let save = serde_json::to_value(SnapshotCreate::here()).unwrap();
    asked.push(("put", "/snapshot/create".into(), save));
    let load = restore(&["tap0".into()]);
    asked.push(("put", load.path, load.body));
    for (verb, path, body) in asked {
        allowed(&description, verb, &path, &body).unwrap_or_else(|error| panic!("{version}: {error}"));
    }
}

#[test]
fn every_request_to_cloud_hypervisor_is_one_of_its_own() {
    let Some(description) = description("OFFSHOOT_CLOUD_HYPERVISOR_API") else {
        return;
    };
    let resize = ResizeDisk {
        id: "disk-root".into(),
        desired_size: 1 << 40,
    };
    let resize = serde_json::to_value(resize).unwrap();
    allowed(&description, "put", "/vm.resize-disk", &resize).unwrap();
    let snapshot = Snapshot {
        destination_url: "file:///d".into(),
    };
    let snapshot = serde_json::to_value(snapshot).unwrap();
    allowed(&description, "put", "/vm.snapshot", &snapshot).unwrap();
    for path in ["/vm.pause", "/vm.resume", "/vm.power-button", "/vmm.shutdown"] {
        assert!(description["paths"][path]["put"].is_object(), "{path}");
    }
    for path in ["/vm.info", "/vmm.ping"] {
        assert!(description["paths"][path]["get"].is_object(), "{path}");
    }
}

#[test]
fn what_is_wrong_is_found() {
    let description = json!({
        "paths": {"/a/{id}": {"put": {"parameters": [{"in": "body", "schema": {"$ref": "#/definitions/A"}}]}}},
        "definitions": {"A": {"type": "object", "required": ["n"], "properties": {
            "n": {"type": "integer", "maximum": 5}, "s": {"type": "string", "enum": ["x"]},
        }}},
    });
    let check = |path: &str, body: &Value| allowed(&description, "put", path, body);
    check("/a/1", &json!({"n": 5, "s": "x"})).unwrap();
    for (path, body) in [
        ("/a/1", json!({})),
        ("/a/1", json!({"n": 6})),
        ("/a/1", json!({"n": "5"})),
        ("/a/1", json!({"n": 1, "s": "y"})),
        ("/a/1", json!({"n": 1, "other": true})),
        ("/a/1", json!([])),
        ("/b/1", json!({"n": 1})),
    ] {
        assert!(check(path, &body).is_err(), "{path} {body}");
    }
}
