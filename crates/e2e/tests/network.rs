//! Networks of VMs: addresses that last, bridges that come and go, and what happens when somebody interferes.

use std::process::Command;

use offshoot_e2e::{Daemon, IMAGE, Namespace, wait_until};
use serde_json::{Value, json};

/// Sends one echo request to an address of either family, and ends well when the reply comes (RFC 792, RFC 4443). Guests and
/// hosts have no `ping`, but every Debian has Perl.
const PING: &str = r#"
use Socket qw(:DEFAULT inet_pton);
my $to = shift;
my $six = $to =~ /:/;
my $family = $six ? AF_INET6 : AF_INET;
socket(my $socket, $family, SOCK_RAW, $six ? 58 : 1) or die "socket: $!";
my $packet = pack("C2n3a8", $six ? 128 : 8, 0, 0, $$ & 0xffff, 1, "offshoot");
my $sum = 0;
$sum += $_ for unpack("n*", $packet);
$sum = ($sum >> 16) + ($sum & 0xffff);
substr($packet, 2, 2) = pack("n", ~$sum & 0xffff) unless $six;
my $address = inet_pton($family, $to) or die "$to is no address";
my $where = $six ? pack_sockaddr_in6(0, $address) : pack_sockaddr_in(0, $address);
send($socket, $packet, 0, $where) or die "send: $!";
alarm 5;
while (defined recv($socket, my $reply, 1500, 0)) {
    $reply = substr($reply, (ord($reply) & 15) * 4) unless $six;
    my ($type, undef, undef, $id) = unpack("C2n2", $reply);
    exit 0 if $type == ($six ? 129 : 0) and $id == ($$ & 0xffff);
}
"#;

/// Waits until an address answers a VM.
fn vm_reaches(daemon: &Daemon, vm: &str, address: &str) {
    wait_until(&format!("{address} to answer {vm}"), || {
        let answer = daemon.cli(["exec", vm, "perl", "-e", PING, address]).run();
        answer.status.success()
    });
}

/// Waits until an address answers the namespace's own side.
fn host_reaches(namespace: &Namespace, address: &str) {
    let ping = || -> Command {
        let mut command = namespace.inside("perl");
        command.args(["-e", PING, address]);
        command
    };
    wait_until(&format!("{address} to answer the host"), || {
        ping().output().expect("perl").status.success()
    });
}

/// The addresses that a guest has, IPv4 first.
fn addresses(daemon: &Daemon, vm: &str) -> Vec<String> {
    let said = daemon.ok(["exec", vm, "hostname", "-I"]);
    let mut addresses: Vec<_> = said.split_whitespace().map(str::to_owned).collect();
    addresses.sort_by_key(|address| address.contains(':'));
    addresses
}

/// Names of interfaces in the namespace, but for what is always there.
fn interfaces(daemon: &Daemon, prefix: &str) -> Vec<String> {
    let said = daemon.namespace().ok(&["ip", "-json", "link", "show"]);
    let links: Value = serde_json::from_str(&said).unwrap();
    let names = links.as_array().unwrap().iter();
    let names = names.filter_map(|link| link["ifname"].as_str());
    names
        .filter(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .collect()
}

fn run(daemon: &Daemon, vm: &str) {
    daemon.ok([
        "run", "-d", "--name", vm, "--memory", "128m", IMAGE, "sleep", "100000",
    ]);
}

#[test]
fn vms_reach_each_other_and_keep_their_addresses() {
    let mut daemon = Daemon::start();
    assert_eq!(interfaces(&daemon, "ofs-"), [""; 0], "no VM runs");
    run(&daemon, "one");
    run(&daemon, "two");
    let (one, two) = (addresses(&daemon, "one"), addresses(&daemon, "two"));
    assert_eq!(one.len(), 2, "an IPv4 and an IPv6 address: {one:?}");
    assert!(
        one[0].starts_with("10.87.") && one[1].starts_with("fd"),
        "{one:?}"
    );
    assert!(
        one.iter().all(|address| !two.contains(address)),
        "{one:?} {two:?}"
    );
    let bridges = interfaces(&daemon, "ofs-");
    assert_eq!(bridges.len(), 1, "{bridges:?}");
    assert_eq!(interfaces(&daemon, "os-").len(), 2);

    let gateways = [
        format!("{}.1", one[0].rsplit_once('.').unwrap().0),
        format!("{}::1", one[1].split_once("::").unwrap().0),
    ];
    for address in gateways.iter().chain(&two) {
        vm_reaches(&daemon, "one", address);
    }

    daemon.ok(["stop", "-t", "5", "one"]);
    run(&daemon, "three");
    let three = addresses(&daemon, "three");
    daemon.ok(["start", "one"]);
    assert_eq!(addresses(&daemon, "one"), one, "over stop and start");
    vm_reaches(&daemon, "two", &one[0]);

    assert!(daemon.terminate().success());
    daemon.start_again();
    for (vm, had) in [("one", &one), ("two", &two), ("three", &three)] {
        assert_eq!(&addresses(&daemon, vm), had, "over a restart of the daemon");
    }
    vm_reaches(&daemon, "three", &two[1]);
    daemon.ok(["rm", "-f", "one", "two", "three"]);
    assert_eq!(interfaces(&daemon, "os-"), [""; 0], "the last VM is gone");

    // One that was given back rests while others are free.
    run(&daemon, "four");
    let four = addresses(&daemon, "four");
    assert!(![&one, &two, &three].contains(&&four), "{four:?}");
    daemon.finish();
}

#[test]
fn two_daemons_share_a_namespace() {
    let first = Daemon::start();
    let second = Daemon::start_beside(&first);
    for daemon in [&first, &second] {
        run(daemon, "same");
    }
    let (one, two) = (addresses(&first, "same"), addresses(&second, "same"));
    assert_ne!(one, two);
    assert_eq!(interfaces(&first, "ofs-").len(), 2, "a bridge for each");
    for address in one.iter().chain(&two) {
        host_reaches(first.namespace(), address);
    }
    second.ok(["rm", "-f", "same"]);
    second.at_rest();
    assert_eq!(interfaces(&first, "osp-").len(), 8, "a pool for each");
    assert_eq!(interfaces(&first, "os-").len(), 1);
    host_reaches(first.namespace(), &one[0]);
    assert_eq!(
        second
            .ok(["doctor", "--output", "json"])
            .matches("subnet-collides")
            .count(),
        0
    );

    // Its network is there while no VM is, so the first daemon's VMs must leave it alone.
    run(&second, "again");
    assert_eq!(addresses(&second, "again").len(), 2);
    host_reaches(first.namespace(), &addresses(&second, "again")[0]);
    first.ok(["rm", "-f", "same"]);
    second.ok(["rm", "-f", "again"]);
    // What the first keeps ready would be seen in the namespace that they share.
    first.ok(["net", "rm", "default"]);
    second.finish();
    first.finish();
}

#[test]
fn a_range_that_collides_is_refused() {
    let daemon = Daemon::start_with("network_pool = \"10.99.7.0/24\"");
    let namespace = daemon.namespace();
    let occupy = || {
        namespace.ok(&["ip", "link", "add", "occupied", "type", "bridge"]);
        namespace.ok(&["ip", "address", "add", "10.99.7.9/28", "dev", "occupied"]);
        namespace.ok(&["ip", "link", "set", "occupied", "up"]);
    };
    let free = || namespace.ok(&["ip", "link", "del", "occupied"]);

    occupy();
    let refused = daemon.cli(["create", "--name", "late", IMAGE, "true"]).fails(1);
    assert!(
        refused.contains("no subnet of 10.99.7.0/24 is free")
            && refused.contains("hint: ")
            && refused.contains("network_pool"),
        "{refused}"
    );
    assert_eq!(daemon.ok(["ps", "-aq"]), "", "nothing was made");
    free();

    daemon.ok(["create", "--name", "late", IMAGE, "true"]);
    occupy();
    let refused = daemon.cli(["start", "late"]).fails(1);
    assert!(
        refused.contains("collides with this host's route to 10.99.7.0/28"),
        "{refused}"
    );
    assert!(refused.contains("hint: "), "{refused}");
    assert!(daemon.ok(["doctor"]).contains("collides"));
    assert_eq!(interfaces(&daemon, "ofs-"), [""; 0]);
    free();
    daemon.ok(["start", "late"]);
    daemon.finish();
}

#[test]
fn a_killed_daemon_leaves_the_network_and_the_next_one_mends_it() {
    let mut daemon = Daemon::start();
    run(&daemon, "one");
    run(&daemon, "two");
    let (one, two) = (addresses(&daemon, "one"), addresses(&daemon, "two"));
    daemon.kill();
    host_reaches(daemon.namespace(), &one[0]);
    host_reaches(daemon.namespace(), &two[1]);

    // As an administrator would who thinks that nobody needs it.
    let bridge = interfaces(&daemon, "ofs-").remove(0);
    daemon.namespace().ok(&["ip", "link", "del", &bridge]);
    daemon.start_again();
    host_reaches(daemon.namespace(), &one[0]);
    vm_reaches(&daemon, "one", &two[0]);
    vm_reaches(&daemon, "two", &one[1]);

    daemon.kill();
    daemon.namespace().ok(&["ip", "address", "flush", "dev", &bridge]);
    daemon.namespace().ok(&["ip", "link", "set", &bridge, "down"]);
    let tap = interfaces(&daemon, "os-").remove(0);
    daemon.namespace().ok(&["ip", "link", "set", &tap, "nomaster"]);
    daemon.start_again();
    for address in one.iter().chain(&two) {
        host_reaches(daemon.namespace(), address);
    }

    // A TAP that belonged to a VM that nobody knows any more, on our bridge.
    daemon.kill();
    daemon
        .namespace()
        .ok(&["ip", "tuntap", "add", "dev", "os-0123456789ab", "mode", "tap"]);
    daemon
        .namespace()
        .ok(&["ip", "link", "set", "os-0123456789ab", "master", &bridge]);
    daemon.start_again();
    wait_until("the TAP to be removed", || {
        interfaces(&daemon, "os-0123456789ab").is_empty()
    });
    assert_eq!(interfaces(&daemon, "os-").len(), 2);
    vm_reaches(&daemon, "one", &two[0]);
    daemon.finish();
}

#[test]
fn a_vm_without_a_network_has_loopback_alone() {
    let daemon = Daemon::start();
    let body =
        json!({"name": "alone", "image": IMAGE, "cmd": ["sleep", "100000"], "network": {"network": "none"}});
    let (status, answer) = daemon.post("/v1/vms", &body);
    assert_eq!(status, 201, "{answer}");
    daemon.ok(["start", "alone"]);
    assert_eq!(interfaces(&daemon, "o"), [""; 0]);
    assert_eq!(daemon.ok(["exec", "alone", "ls", "/sys/class/net"]), "lo");
    assert_eq!(daemon.ok(["exec", "alone", "echo", "usable"]), "usable");
    daemon.finish();
}

#[test]
fn a_chosen_address_is_had_or_refused() {
    let daemon = Daemon::start_with("network_pool = \"10.98.1.0/24\"");
    let create = |name: &str, network: Value| {
        let body = json!({"name": name, "image": IMAGE, "cmd": ["true"], "network": network});
        daemon.post("/v1/vms", &body)
    };
    let (status, answer) = create("mine", json!({"ipv4": "10.98.1.77"}));
    assert_eq!(status, 201, "{answer}");
    for (network, expected, said) in [
        (json!({"ipv4": "10.98.1.77"}), 409, "has 10.98.1.77"),
        (json!({"ipv4": "10.98.1.1"}), 400, "no address for a VM"),
        (json!({"ipv4": "10.98.1.255"}), 400, "no address for a VM"),
        (json!({"ipv4": "10.98.2.7"}), 400, "no address for a VM"),
        (json!({"network": "unknown"}), 404, "no network named `unknown`"),
    ] {
        let (status, answer) = create("refused", network.clone());
        assert_eq!(status, expected, "{network}: {answer}");
        assert!(answer.to_string().contains(said), "{answer}");
        assert!(
            answer["hints"].as_array().is_some_and(|hints| !hints.is_empty()),
            "{answer}"
        );
    }
    let rows = daemon.database().rows_of_vms();
    let given: Vec<_> = rows.iter().filter(|row| row.starts_with("addresses")).collect();
    assert_eq!(given.len(), 1, "{given:?}");
    daemon.finish();
}
