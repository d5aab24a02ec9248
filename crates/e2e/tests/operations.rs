//! Many operations at once, in no order: whatever clients ask, database and host agree in the end.

use std::collections::BTreeMap;
use std::process::Child;
use std::time::{Duration, Instant};

use offshoot_e2e::{Daemon, IMAGE, Random, after, tell, wait_until};
use serde_json::{Value, json};

const CLIENTS: usize = 8;
const OPERATIONS: usize = 1000;
/// Few, so that clients meet at the same VMs.
const NAMES: usize = 16;
/// A command that a paused VM holds up is given up, as by a user who presses Ctrl-C.
const GIVE_UP: Duration = Duration::from_secs(3);

/// Main processes: some last, some end by themselves, well or badly, one never starts and one takes the guest with it.
const COMMANDS: [&[&str]; 7] = [
    &["sleep", "infinity"],
    &["sleep", "infinity"],
    &["sh", "-c", "echo begun; exec sleep infinity"],
    &["true"],
    &["sh", "-c", "echo words; sleep 0.2; exit 3"],
    &["/nonexistent/program"],
    &["sh", "-c", "sleep 0.1; poweroff"],
];

/// Operations, each as often as its number says, of 100.
const WEIGHTS: [(&str, usize); 15] = [
    ("create", 24),
    ("start", 20),
    ("stop", 6),
    ("kill", 4),
    ("signal", 3),
    ("pause", 7),
    ("resume", 7),
    ("restart", 6),
    ("rename", 3),
    ("rm", 3),
    ("rm -f", 3),
    ("exec", 6),
    ("inspect", 4),
    ("ps", 2),
    ("ps -a", 2),
];

fn choose(random: &mut Random) -> &'static str {
    let mut at = random.below(WEIGHTS.iter().map(|(_, weight)| weight).sum());
    for (operation, weight) in WEIGHTS {
        match at.checked_sub(weight) {
            Some(rest) => at = rest,
            None => return operation,
        }
    }
    unreachable!("below the sum")
}

/// How often each operation had each answer.
type Tally = BTreeMap<(&'static str, String), usize>;

fn client(daemon: &Daemon, mut random: Random, operations: usize) -> Tally {
    let mut tally = Tally::new();
    for _ in 0..operations {
        let operation = choose(&mut random);
        let answer = act(daemon, operation, &mut random);
        *tally.entry((operation, answer)).or_default() += 1;
    }
    tally
}

/// Carries one operation out; gives the answer's status. A mistake of the daemon's own (5XX) fails the test.
fn act(daemon: &Daemon, operation: &'static str, random: &mut Random) -> String {
    let name = format!("vm-{}", random.below(NAMES));
    let vm = format!("/v1/vms/{name}");
    let (method, path, body) = match operation {
        "create" => {
            let command = COMMANDS[random.below(COMMANDS.len())];
            let body = json!({"name": name, "image": IMAGE, "cmd": command, "memory": 64 << 20,
                "auto_remove": random.below(5) == 0});
            ("POST", "/v1/vms".to_owned(), Some(body))
        }
        "exec" => return exec(daemon, &name),
        "signal" => ("POST", format!("{vm}/kill?signal=TERM"), None),
        "stop" | "restart" => ("POST", format!("{vm}/{operation}?time_s=5"), None),
        "rename" => (
            "POST",
            format!("{vm}/rename?name=vm-{}", random.below(NAMES)),
            None,
        ),
        "rm" => ("DELETE", vm, None),
        "rm -f" => ("DELETE", format!("{vm}?force=true"), None),
        "inspect" => ("GET", vm, None),
        "ps" => ("GET", "/v1/vms".to_owned(), None),
        "ps -a" => ("GET", "/v1/vms?all=true".to_owned(), None),
        // start, kill, pause, resume
        _ => ("POST", format!("{vm}/{operation}"), None),
    };
    let (status, answer) = daemon.ask(method, &path, body.as_ref());
    assert!(status < 500, "{operation} {name}: {status} {answer}");
    status.to_string()
}

/// A command in a VM, by the CLI; it may have to be given up.
fn exec(daemon: &Daemon, name: &str) -> String {
    let mut child = daemon.cli(["exec", name, "sh", "-c", "exit 3"]).spawn();
    let Some(status) = ended(&mut child) else {
        child.kill().expect("kill");
        child.wait().expect("wait");
        return "given up".to_owned();
    };
    // 3 is the command's own; 1 a refusal; 125, 137 and 143 a VM that went away meanwhile or ended its processes.
    assert!(matches!(status, 1 | 3 | 125 | 137 | 143), "exec {name}: {status}");
    format!("exit {status}")
}

fn ended(child: &mut Child) -> Option<i32> {
    let began = Instant::now();
    while began.elapsed() < GIVE_UP {
        if let Some(status) = child.try_wait().expect("wait") {
            return Some(status.code().expect("not by a signal"));
        }
        after(Duration::from_millis(5));
    }
    None
}

/// Whether nothing will happen by itself any more: no main process runs that ends, and no VM is about to be removed.
fn is_at_rest(daemon: &Daemon) -> bool {
    let vms = daemon.get_json("/v1/vms?all=true");
    vms.as_array().expect("a list").iter().all(|vm| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match text(&vm["state"]).as_str() {
            "running" => text(&vm["command"]).contains("infinity"),
            "stopped" | "failed" => {
                let asked = ["stopped", "killed"].contains(&text(&vm["exit"]["reason"]).as_str());
                let (_, details) = daemon.ask("GET", &format!("/v1/vms/{}", text(&vm["id"])), None);
                asked || details["config"]["auto_remove"] == false
            }
            state => ["created", "paused"].contains(&state),
        }
    })
}

#[test]
fn a_thousand_operations_of_eight_clients_leave_everything_in_agreement() {
    let mut random = Random::seeded();
    let daemon = Daemon::start_fake("");
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let random = random.fork();
                let daemon = &daemon;
                scope.spawn(move || client(daemon, random, OPERATIONS / CLIENTS))
            })
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("a client"))
            .collect()
    });
    let mut sum = Tally::new();
    for (key, count) in tallies.into_iter().flatten() {
        *sum.entry(key).or_default() += count;
    }
    for ((operation, answer), count) in &sum {
        tell(&format!("{count:>5} {operation}: {answer}"));
    }
    assert_eq!(sum.values().sum::<usize>(), OPERATIONS);
    // It was no test of refusals alone.
    for (operation, answer) in [
        ("create", "201"),
        ("start", "200"),
        ("pause", "200"),
        ("rm", "204"),
    ] {
        assert!(
            sum.contains_key(&(operation, answer.to_owned())),
            "no {operation} succeeded"
        );
    }
    wait_until("what goes on by itself to be over", || is_at_rest(&daemon));
    daemon.wait_until_all_agree();
    daemon.finish();
}
