//! Bad input: one clear error with a hint, and nothing half-made.

use serde_json::Value;

use crate::{Daemon, names};

/// What a refusal must leave as it was: the names in every folder of the store, the VMs, and their helpers' processes.
pub fn stored(daemon: &Daemon) -> Vec<String> {
    let data = daemon.data();
    let mut stored = Vec::new();
    for folder in ["vms", "tmp", "bases", "blobs/sha256", "kernels"] {
        stored.push(format!("{folder}: {:?}", names(&data.join(folder))));
    }
    stored.push(format!("sockets: {:?}", names(&daemon.root().join("run/vms"))));
    stored.push(format!("VMs: {}", daemon.ok(["ps", "-aq"])));
    stored.extend(daemon.virtiofsds().into_iter().map(|process| process.line));
    stored
}

/// It fails with status 1, says `what`, gives a hint, and leaves the store as it was. Gives the error.
pub fn refused(daemon: &Daemon, arguments: &[&str], what: &str) -> String {
    let before = stored(daemon);
    let error = daemon.cli(arguments).fails(1);
    assert!(error.starts_with("error: "), "{arguments:?}: {error}");
    assert!(
        error.to_lowercase().contains(&what.to_lowercase()),
        "{arguments:?} does not say {what:?}: {error}"
    );
    assert!(error.contains("hint: "), "{arguments:?} gives no hint: {error}");
    assert_eq!(stored(daemon), before, "{arguments:?} left something");
    error
}

/// The same for a request that our CLI would not send: `POST PATH` with `body` is the client's mistake (4XX).
pub fn refused_by_the_api(daemon: &Daemon, path: &str, body: &Value, what: &str) {
    let before = stored(daemon);
    let (status, answer) = daemon.post(path, body);
    assert!((400..500).contains(&status), "{body}: {status} {answer}");
    let message = format!("{} {}", answer["message"], answer["causes"]);
    assert!(
        message.to_lowercase().contains(&what.to_lowercase()),
        "{body} does not say {what:?}: {answer}"
    );
    let hints = answer["hints"].as_array().map_or(0, Vec::len);
    assert!(hints > 0, "{body} gives no hint: {answer}");
    assert_eq!(stored(daemon), before, "{body} left something");
}
