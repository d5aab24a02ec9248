//! What real VMs may talk to: beyond the host, each other, the host itself, and who reaches them.

use std::process::Command;

use offshoot_e2e::{Daemon, IMAGE, Namespace, wait_until};
use serde_json::{Value, json};

const OUTSIDE: &str = "198.51.100.2";
const UPLINK: &str = "198.51.100.1";

/// Answers everybody who connects to port `$1` with the address that it sees.
const SERVE: &str = r#"
use Socket;
my $port = shift;
socket(my $server, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
setsockopt($server, SOL_SOCKET, SO_REUSEADDR, 1);
bind($server, pack_sockaddr_in($port, INADDR_ANY)) or die "bind: $!";
listen($server, 5);
$| = 1;
while (my $peer = accept(my $client, $server)) {
    my (undef, $address) = unpack_sockaddr_in($peer);
    syswrite($client, "you are " . inet_ntoa($address) . "\n");
    close($client);
}
"#;

/// Connects to `$1` port `$2` and prints what it is told.
const ASK: &str = r#"
use Socket;
alarm 3;
socket(my $socket, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
connect($socket, pack_sockaddr_in($ARGV[1], inet_aton($ARGV[0]))) or die "connect: $!";
print while <$socket>;
"#;

/// A program that is ended when it is dropped.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(place: &Namespace, port: &str) -> Server {
    let mut command = place.inside("perl");
    command.args(["-e", SERVE, port]);
    Server(command.spawn().expect("perl"))
}

/// What lies outside of the host: another namespace, by which the host's default route leads.
fn outside(daemon: &Daemon) -> Namespace {
    let host = daemon.namespace();
    let outside = Namespace::make(&format!("{}-out", host.name()));
    host.ok(&[
        "ip",
        "link",
        "add",
        "up0",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        outside.name(),
    ]);
    outside.ok(&["ip", "address", "add", &format!("{OUTSIDE}/24"), "dev", "eth0"]);
    outside.ok(&["ip", "link", "set", "eth0", "up"]);
    host.ok(&["ip", "address", "add", &format!("{UPLINK}/24"), "dev", "up0"]);
    host.ok(&["ip", "link", "set", "up0", "up"]);
    host.ok(&["ip", "route", "add", "default", "via", OUTSIDE]);
    outside
}

/// The host's end of it goes, so that nothing is left.
fn take_away(daemon: &Daemon, outside: Namespace) {
    daemon.namespace().ok(&["ip", "link", "del", "up0"]);
    drop(outside);
}

/// A VM that runs, with this in its network's request.
fn run(daemon: &Daemon, name: &str, network: &Value) -> String {
    let body = json!({
        "name": name, "image": IMAGE, "cmd": ["sleep", "100000"], "memory": 192_u64 << 20, "network": network,
    });
    let (status, answer) = daemon.post("/v1/vms", &body);
    assert_eq!(status, 201, "{answer}");
    daemon.ok(["start", name]);
    let addresses = daemon.ok(["exec", name, "hostname", "-I"]);
    let ipv4 = addresses
        .split_whitespace()
        .find(|address| !address.contains(':'));
    ipv4.expect("an IPv4 address").to_owned()
}

fn serve_in(daemon: &Daemon, vm: &str, port: &str) {
    let serve = format!("perl -e '{SERVE}' {port} >/dev/null 2>&1 &");
    daemon.ok(["exec", vm, "sh", "-c", &serve]);
}

fn said(command: &mut Command) -> Option<String> {
    let output = command.output().expect("a program");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// What a server tells a VM; nothing when it cannot be reached.
fn vm_asks(daemon: &Daemon, vm: &str, address: &str, port: &str) -> Option<String> {
    let answer = daemon.cli(["exec", vm, "perl", "-e", ASK, address, port]).run();
    let text = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
    (answer.status.success() && !text.is_empty()).then_some(text)
}

fn asks(place: &Namespace, address: &str, port: &str) -> Option<String> {
    said(place.inside("perl").args(["-e", ASK, address, port]))
}

fn rules(daemon: &Daemon) -> String {
    daemon.namespace().ok(&["nft", "-s", "list", "ruleset"])
}

#[test]
fn packets_go_where_they_may_and_nowhere_else() {
    let mut daemon = Daemon::start();
    let out = outside(&daemon);
    let _web = serve(&out, "80");
    let _ssh = serve(daemon.namespace(), "22");
    daemon.namespace().ok(&["nft", "add", "table", "inet", "theirs"]);
    let before = rules(&daemon);

    let published = json!({"publish": [{"host": 8080, "guest": 80}, {"address": "127.0.0.1", "host": 8081, "guest": 80}]});
    let web = run(&daemon, "web", &published);
    let plain = run(&daemon, "plain", &json!({}));
    run(
        &daemon,
        "alone",
        &json!({"isolate": true, "nat": false, "allow": ["host"]}),
    );
    for port in ["80", "81"] {
        serve_in(&daemon, "web", port);
    }
    let you_are = |who: &str| Some(format!("you are {who}"));
    wait_until("a server behind NAT to be reached", || {
        vm_asks(&daemon, "plain", OUTSIDE, "80") == you_are(UPLINK)
    });
    wait_until("a published port to be reached from outside", || {
        asks(&out, UPLINK, "8080") == you_are(OUTSIDE)
    });
    wait_until("another VM to be reached", || {
        vm_asks(&daemon, "plain", &web, "81") == you_are(&plain)
    });
    assert!(asks(daemon.namespace(), "127.0.0.1", "8080").is_some());
    assert!(asks(daemon.namespace(), "127.0.0.1", "8081").is_some());
    assert_eq!(asks(&out, UPLINK, "81"), None, "not published");
    assert_eq!(asks(&out, UPLINK, "8081"), None, "published for the host alone");
    out.ok(&["ip", "route", "add", "10.87.0.0/16", "via", UPLINK]);
    assert_eq!(asks(&out, &web, "80"), None, "around the published port");
    let gateway = format!("{}.1", web.rsplit_once('.').unwrap().0);
    assert_eq!(
        vm_asks(&daemon, "plain", &gateway, "22"),
        None,
        "a service of the host"
    );
    assert_eq!(
        vm_asks(&daemon, "plain", UPLINK, "22"),
        None,
        "by another address"
    );
    assert!(
        vm_asks(&daemon, "alone", &gateway, "22").is_some(),
        "--allow host"
    );
    assert_eq!(vm_asks(&daemon, "alone", OUTSIDE, "80"), None, "--no-nat");
    assert_eq!(vm_asks(&daemon, "alone", &web, "80"), None, "--isolate");

    // Who publishes what is published is told who has it.
    let (status, answer) = daemon.post(
        "/v1/vms",
        &json!({"name": "late", "image": IMAGE, "network": {"publish": [{"host": 8080, "guest": 80}]}}),
    );
    assert_eq!(status, 409, "{answer}");

    // A daemon that is killed takes nothing along, and the next one knows the rules.
    daemon.kill();
    assert_eq!(asks(&out, UPLINK, "8080"), you_are(OUTSIDE));
    daemon.start_again();
    daemon.ok(["stop", "-t", "2", "plain"]);
    assert_eq!(asks(&out, UPLINK, "8080"), you_are(OUTSIDE));
    daemon.ok(["rm", "-f", "web", "plain", "alone"]);
    assert_eq!(asks(&out, UPLINK, "8080"), None);
    assert_eq!(rules(&daemon), before, "those of others, and no others");
    daemon
        .namespace()
        .ok(&["nft", "delete", "table", "inet", "theirs"]);
    take_away(&daemon, out);
    daemon.finish();
}

#[test]
fn a_vm_with_anothers_address_gets_no_traffic() {
    let daemon = Daemon::start();
    let out = outside(&daemon);
    let _web = serve(&out, "80");
    let victim = run(&daemon, "victim", &json!({}));
    let thief = run(&daemon, "thief", &json!({}));
    serve_in(&daemon, "victim", "80");
    for vm in ["victim", "thief"] {
        wait_until("the server to be reached", || {
            vm_asks(&daemon, vm, OUTSIDE, "80").is_some()
        });
    }
    let mac = daemon.ok(["exec", "victim", "cat", "/sys/class/net/eth0/address"]);
    let gateway = format!("{}.1", victim.rsplit_once('.').unwrap().0);
    // Guests have no `ip`, but Perl knows how to ask the kernel (netdevice(7)).
    let change = |request: &str, value: &str| {
        let script = format!(
            r#"use Socket; socket(my $s, PF_INET, SOCK_DGRAM, 0); my $r = pack("Z16", "eth0") . {value}; $r .= "\0" x (40 - length $r); ioctl($s, {request}, $r) or die "$!";"#
        );
        daemon.ok(["exec", "thief", "perl", "-e", &script]);
    };
    // SIOCSIFADDR. The route goes with the address.
    change(
        "0x8916",
        &format!(r#"pack("SSa4a8", 2, 0, inet_aton("{victim}"), "")"#),
    );
    assert_eq!(vm_asks(&daemon, "thief", OUTSIDE, "80"), None, "with its IP");
    assert_eq!(vm_asks(&daemon, "thief", &gateway, "53"), None, "with its IP");
    // SIOCSIFHWADDR.
    let bytes: Vec<_> = mac.split(':').map(|byte| format!("0x{byte}")).collect();
    change("0x8924", &format!(r#"pack("SC6", 1, {})"#, bytes.join(", ")));
    assert_eq!(
        vm_asks(&daemon, "thief", OUTSIDE, "80"),
        None,
        "with its MAC as well"
    );
    assert_eq!(
        vm_asks(&daemon, "victim", OUTSIDE, "80"),
        Some(format!("you are {UPLINK}"))
    );
    assert!(
        asks(daemon.namespace(), &victim, "80").is_some(),
        "who has it has it still"
    );
    assert_ne!(thief, victim);
    daemon.ok(["rm", "-f", "victim", "thief"]);
    take_away(&daemon, out);
    daemon.finish();
}
