//! Networks and published ports as users handle them: what is listed, what is refused, what leads where, what is counted.

use offshoot_e2e::{Daemon, IMAGE, Namespace, Scrape, refused, refused_by_the_api, stored, wait_until};
use serde_json::{Value, json};

fn json_of(daemon: &Daemon, arguments: &[&str]) -> Value {
    serde_json::from_str(&daemon.ok(arguments)).expect("JSON")
}

fn networks(daemon: &Daemon) -> Vec<String> {
    let names = daemon.ok(["net", "ls", "-q"]);
    names.lines().map(str::to_owned).collect()
}

#[test]
fn a_network_lives_from_create_to_rm() {
    let daemon = Daemon::start();
    assert_eq!(networks(&daemon), [""; 0]);
    assert_eq!(
        daemon.ok(["net", "create", "--subnet", "10.214.7.0/24", "lab"]),
        "lab"
    );
    daemon.ok([
        "create",
        "--network",
        "lab",
        "--ip",
        "10.214.7.9",
        "--name",
        "one",
        IMAGE,
        "true",
    ]);
    let listed = json_of(&daemon, &["net", "ls", "--output", "json"]);
    assert_eq!(listed[0]["name"], "lab");
    assert_eq!(listed[0]["ipv4"], "10.214.7.0/24");
    assert_eq!(listed[0]["gateway4"], "10.214.7.1");
    assert_eq!(listed[0]["vms"], 1);
    let table = daemon.ok(["net", "ls"]);
    assert!(
        table.starts_with("NAME   SUBNET ") && table.contains("\nlab    10.214.7.0/24 "),
        "{table}"
    );
    let inspected = json_of(&daemon, &["net", "inspect", "lab"]);
    let member = &inspected["members"][0];
    assert_eq!(
        (&member["name"], &member["ipv4"], &member["state"]),
        (&json!("one"), &json!("10.214.7.9"), &json!("created"))
    );
    let vm = daemon.inspect("one");
    assert_eq!(vm["network"]["name"], "lab");
    assert_eq!(vm["network"]["mac"], member["mac"]);
    assert_eq!(vm["network"]["ipv6"], member["ipv6"]);

    let on_lab = ["create", "--network", "lab"];
    let taken = [&on_lab[..], &["--ip", "10.214.7.9", IMAGE, "true"]].concat();
    refused(&daemon, &taken, "10.214.7.9");
    let gateway = [&on_lab[..], &["--ip", "10.214.7.1", IMAGE, "true"]].concat();
    refused(&daemon, &gateway, "10.214.7.1");
    let unknown = refused(
        &daemon,
        &["create", "--network", "nowhere", IMAGE, "true"],
        "no network named `nowhere`",
    );
    assert!(unknown.contains("offshoot net ls"), "{unknown}");
    refused(&daemon, &["net", "rm", "lab"], "`one` is on it");
    refused(&daemon, &["net", "rm", "nowhere"], "no network named `nowhere`");
    refused(
        &daemon,
        &["net", "inspect", "nowhere"],
        "no network named `nowhere`",
    );
    refused(&daemon, &["net", "create", "lab"], "exists already");
    refused(&daemon, &["net", "create", "none"], "not a network's name");
    refused(&daemon, &["net", "create", "Lab"], "not a network's name");
    refused(
        &daemon,
        &["net", "create", "--subnet", "10.214.0.0/16", "wide"],
        "cannot make the network `wide`",
    );
    for (body, what) in [
        (json!({"name": "../x"}), "not a network's name"),
        (json!({"name": "x", "subnet": "10.0.0.0"}), "no IPv4 subnet"),
        (json!({"name": "x", "subnet": "::/64"}), "no IPv4 subnet"),
        (json!({"subnet": "10.0.0.0/24"}), "missing field"),
    ] {
        refused_by_the_api(&daemon, "/v1/networks", &body, what);
    }
    assert_eq!(networks(&daemon), ["lab"]);

    daemon.ok(["rm", "one"]);
    assert_eq!(daemon.ok(["net", "rm", "lab"]), "lab");
    assert_eq!(networks(&daemon), [""; 0]);
    daemon.finish();
}

#[test]
fn a_daemon_that_starts_again_knows_networks_and_places() {
    let mut daemon = Daemon::start();
    daemon.ok(["net", "create", "lab"]);
    daemon.ok([
        "create",
        "--network",
        "lab",
        "-p",
        "80",
        "--name",
        "one",
        IMAGE,
        "true",
    ]);
    let (network, vm) = (
        json_of(&daemon, &["net", "inspect", "lab"]),
        daemon.inspect("one"),
    );
    daemon.kill();
    daemon.start_again();
    assert_eq!(json_of(&daemon, &["net", "inspect", "lab"]), network);
    let again = daemon.inspect("one");
    assert_eq!(
        (&again["network"], &again["ports"]),
        (&vm["network"], &vm["ports"])
    );
    daemon.ok(["rm", "one"]);
    daemon.ok(["net", "rm", "lab"]);
    daemon.finish();
}

#[test]
fn ports_are_published_as_docker_does_it() {
    let daemon = Daemon::start();
    daemon.ok([
        "create",
        "--name",
        "web",
        "-p",
        "8080:80",
        "-p",
        "127.0.0.1::53/udp",
        "-p",
        "9000-9002:9000-9002",
        IMAGE,
        "true",
    ]);
    let ports = json_of(&daemon, &["port", "web", "--output", "json"]);
    let chosen = ports
        .as_array()
        .unwrap()
        .iter()
        .find(|port| port["guest"] == 53)
        .and_then(|port| port["host"].as_u64())
        .expect("a chosen port");
    assert!(chosen > 0);
    assert_eq!(daemon.ok(["port", "web", "80"]), "0.0.0.0:8080");
    assert_eq!(
        daemon.ok(["port", "web", "53/udp"]),
        format!("127.0.0.1:{chosen}")
    );
    let all = daemon.ok(["port", "web"]);
    assert!(
        all.contains("80/tcp -> 0.0.0.0:8080\n") && all.contains("9002/tcp -> 0.0.0.0:9002"),
        "{all}"
    );
    refused(&daemon, &["port", "web", "53"], "publishes no port 53/tcp");
    let table = daemon.ok(["ps", "-a"]);
    let cell = format!("127.0.0.1:{chosen}->53/udp, 0.0.0.0:8080->80/tcp, 0.0.0.0:9000-9002->9000-9002/tcp");
    assert!(table.contains(&cell), "{table}");
    let row = json_of(&daemon, &["ps", "-a", "--output", "json"])[0].clone();
    assert_eq!(
        (&row["ports"], &row["network"]["name"]),
        (&ports, &json!("default"))
    );
    assert!(
        table.contains(row["network"]["ipv4"].as_str().unwrap()),
        "{table}"
    );

    refused(&daemon, &["create", "-p", "8080:80", IMAGE, "true"], "port 8080");
    refused(
        &daemon,
        &["create", "-p", "8081:80", "-p", "8081:81", IMAGE, "true"],
        "published twice",
    );
    refused(
        &daemon,
        &["create", "--network", "none", "-p", "8081:80", IMAGE, "true"],
        "publishes no ports",
    );
    refused(
        &daemon,
        &["create", "--network", "none", "--ip", "10.0.0.2", IMAGE, "true"],
        "has no address",
    );
    let before = stored(&daemon);
    for bad in ["80:http", "8080:0", "8000-8001:80", "localhost:80:80", "80/sctp"] {
        let said = daemon.cli(["create", "-p", bad, IMAGE, "true"]).fails(2);
        assert!(said.contains("not a port to publish"), "{said}");
    }
    let publish = |port: Value| json!({"image": IMAGE, "network": {"publish": [port]}});
    refused_by_the_api(
        &daemon,
        "/v1/vms",
        &publish(json!({"guest": 0})),
        "from 1 to 65535",
    );
    refused_by_the_api(&daemon, "/v1/vms", &publish(json!({"guest": 70000})), "u16");
    assert_eq!(stored(&daemon), before);

    daemon.ok(["create", "--name", "alone", "--network", "none", IMAGE, "true"]);
    let alone = daemon.inspect("alone");
    assert_eq!((&alone["network"], &alone["ports"]), (&Value::Null, &json!([])));
    assert_eq!(daemon.ok(["port", "alone"]), "");
    daemon.ok(["rm", "web", "alone"]);
    daemon.finish();
}

/// Asks a TCP port for everything that it says.
const ASK: &str = r#"
use Socket;
socket(my $socket, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
alarm 5;
connect($socket, sockaddr_in($ARGV[1], inet_aton($ARGV[0]))) or die "connect: $!";
print while <$socket>;
"#;

/// What the VM says, and how often.
const SAID: &str = "well met\n";
const TIMES: usize = 20_000;

/// Says it to everybody who comes to port 80.
const SAY: &str = r#"
use Socket;
socket(my $socket, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
setsockopt($socket, SOL_SOCKET, SO_REUSEADDR, 1);
bind($socket, sockaddr_in(80, INADDR_ANY)) or die "bind: $!";
listen($socket, 5) or die "listen: $!";
while (accept(my $client, $socket)) { print $client "well met\n" x 20000; close $client }
"#;

fn answers(namespace: &Namespace, address: &str, port: &str) -> bool {
    let asked = namespace.inside("perl").args(["-e", ASK, address, port]).output();
    asked.expect("perl").stdout == SAID.repeat(TIMES).as_bytes()
}

#[test]
fn a_published_port_is_reached_and_what_went_over_is_counted() {
    let daemon = Daemon::start();
    daemon.ok([
        "run",
        "-d",
        "--name",
        "web",
        "-m",
        "128m",
        "-p",
        "127.0.0.1:8080:80",
        "-u",
        "nobody",
        IMAGE,
        "perl",
        "-e",
        SAY,
    ]);
    daemon.ok([
        "run",
        "-d",
        "--name",
        "alone",
        "-m",
        "128m",
        "--network",
        "none",
        IMAGE,
        "sleep",
        "100000",
    ]);
    wait_until("the VM to answer over its published port", || {
        answers(daemon.namespace(), "127.0.0.1", "8080")
    });
    let stats = |vm: &str| -> Value {
        let stats = json_of(&daemon, &["stats", "--no-stream", "--output", "json", vm]);
        stats[0]["network"].clone()
    };
    assert_eq!(stats("alone"), Value::Null);
    let before = stats("web");
    assert!(answers(daemon.namespace(), "127.0.0.1", "8080"));
    let after = stats("web");
    for name in ["received_bytes", "received_packets", "sent_bytes", "sent_packets"] {
        assert!(
            after[name].as_u64() > before[name].as_u64(),
            "{name}: {before} {after}"
        );
    }
    let scrape = Scrape::parse(&daemon.get("/metrics").body);
    for direction in ["received", "sent"] {
        let labels = [("direction", direction)];
        assert!(scrape.value("offshoot_network_bytes_total", &labels) > 0.0);
        assert!(scrape.value("offshoot_network_packets_total", &labels) > 0.0);
    }
    // As the guest sees it: it has said much more than it was told.
    let grown = |name: &str| after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    assert!(
        grown("sent_bytes") as usize >= SAID.len() * TIMES,
        "{before} {after}"
    );
    assert!(
        (grown("received_bytes") as usize) < SAID.len() * TIMES,
        "{before} {after}"
    );
    let table = daemon.ok(["ps"]);
    assert!(table.contains("127.0.0.1:8080->80/tcp"), "{table}");
    daemon.ok(["rm", "-f", "web", "alone"]);
    daemon.finish();
}
