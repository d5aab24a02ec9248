//! Names of real VMs: from the host's side, from another VM, and through everything that happens to a VM and its daemon.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;

use offshoot_e2e::{Daemon, IMAGE, text, wait_until};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What `net dns` says of the only network.
fn server(daemon: &Daemon) -> serde_json::Value {
    let info = daemon.ok(["net", "dns", "--output", "json"]);
    let mut info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["domain"], "vm.internal");
    assert_eq!(info["netns"], daemon.namespace().name());
    let servers = info["servers"].as_array_mut().unwrap();
    assert_eq!(servers.len(), 1, "one network");
    servers.remove(0)
}

/// A VM's address, as `inspect` shows it.
fn address(daemon: &Daemon, vm: &str, family: &str) -> String {
    let details = daemon.inspect(vm);
    let address = details["network"][family].as_str();
    address.unwrap_or_else(|| panic!("{details}")).to_owned()
}

/// What `dig` prints on the host's side of the network.
fn dig(daemon: &Daemon, gateway: &str, arguments: &str) -> String {
    let output = daemon
        .inside("dig")
        .args([&format!("@{gateway}"), "+time=5", "+tries=2"])
        .args(arguments.split_whitespace())
        .output()
        .expect("dig; run scripts/install-deps");
    text(&output.stdout).trim_end().to_owned()
}

fn is_gone(daemon: &Daemon, gateway: &str, name: &str) -> bool {
    dig(daemon, gateway, name).contains("status: NXDOMAIN")
}

/// A resolver in the daemon's namespace that has one address for every name; ends with the test's process.
fn upstream(daemon: &Daemon, address: &'static str) {
    let file = std::fs::File::open(daemon.namespace().file()).unwrap();
    let (ready, made) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let socket = UdpSocket::bind(address).unwrap();
        ready.send(()).unwrap();
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // The question without what follows it (EDNS), and for A one answer: a pointer to its name, A, IN, 60 s.
            let name = buffer[12..length].iter().position(|byte| *byte == 0).unwrap();
            let end = 12 + name + 5;
            let mut answer = buffer[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0]);
            if answer[end - 3] == 1 {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    made.recv().unwrap();
}

#[test]
fn vms_find_each_other_and_others_by_name() {
    let daemon = Daemon::start_with("dns_upstream = [\"127.0.0.1:5353\"]");
    upstream(&daemon, "127.0.0.1:5353");
    daemon.start_all(&[
        vec!["--name", "web", IMAGE, "sleep", "infinity"],
        vec!["--name", "db", IMAGE, "sleep", "infinity"],
    ]);
    let (web, web6) = (address(&daemon, "web", "ipv4"), address(&daemon, "web", "ipv6"));
    let server = server(&daemon);
    let (gateway, gateway6) = (server["ipv4"].as_str().unwrap(), server["ipv6"].as_str().unwrap());
    assert_eq!(server["listening"], true);

    // From the host's side, by both protocols and both addresses of the server.
    for (at, arguments, expected) in [
        (gateway, "+short web.vm.internal", web.as_str()),
        (gateway, "+short +tcp Web.VM.internal", &web),
        (gateway6, "+short web.vm.internal AAAA", &web6),
        (gateway, &format!("+short -x {web}"), "web.vm.internal."),
        (gateway6, &format!("+short -x {web6}"), "web.vm.internal."),
    ] {
        assert_eq!(dig(&daemon, at, arguments), expected, "@{at} {arguments}");
    }

    // From another VM: by plain name, by the whole name, backwards, and somebody else's name.
    let getent = |arguments: &[&str]| daemon.ok([&["exec", "db", "getent"], arguments].concat());
    for name in ["web", "web.vm.internal"] {
        let found = getent(&["ahostsv4", name]);
        assert!(found.starts_with(&format!("{web} ")), "{name}: {found}");
        let found = getent(&["ahostsv6", name]);
        assert!(found.starts_with(&format!("{web6} ")), "{name}: {found}");
    }
    assert!(getent(&["hosts", &web]).contains("web.vm.internal"));
    assert!(getent(&["hosts", &web6]).contains("web.vm.internal"));
    assert!(getent(&["ahostsv4", "www.example.org"]).starts_with("192.0.2.7 "));
    let unknown = daemon.cli(["exec", "db", "getent", "hosts", "nobody"]).run();
    assert!(!unknown.status.success());

    // A name goes with its VM, at once.
    daemon.ok(["rename", "web", "www"]);
    assert!(is_gone(&daemon, gateway, "web.vm.internal"));
    assert_eq!(dig(&daemon, gateway, "+short www.vm.internal"), web);
    daemon.ok(["stop", "-t", "1", "www"]);
    assert!(is_gone(&daemon, gateway, "www.vm.internal"));
    daemon.ok(["start", "www"]);
    assert_eq!(
        dig(&daemon, gateway, "+short www.vm.internal"),
        web,
        "it keeps its address"
    );
    daemon.ok(["rm", "-f", "www"]);
    assert!(is_gone(&daemon, gateway, "www.vm.internal"));
    assert!(is_gone(&daemon, gateway, &format!("-x {web}")));
    daemon.ok(["rm", "-f", "db"]);
    daemon.finish();
}

#[test]
fn names_are_known_again_after_the_daemon_was_killed() {
    let mut daemon = Daemon::start();
    daemon.start_all(&[
        vec!["--name", "one", IMAGE, "sleep", "infinity"],
        vec!["--name", "two", IMAGE, "sleep", "infinity"],
    ]);
    let one = address(&daemon, "one", "ipv4");
    let gateway = server(&daemon)["ipv4"].as_str().unwrap().to_owned();
    assert_eq!(dig(&daemon, &gateway, "+short one.vm.internal"), one);
    daemon.kill();
    assert!(
        !dig(&daemon, &gateway, "+short +time=1 +tries=1 one.vm.internal").contains(&one),
        "nobody answers without the daemon"
    );
    daemon.start_again();
    // Nobody is told meanwhile that there is no such name.
    wait_until("the name to be known again", || {
        let answer = dig(&daemon, &gateway, "+time=1 +tries=1 one.vm.internal");
        assert!(!answer.contains("status: NXDOMAIN"), "{answer}");
        answer.contains(&one)
    });
    let found = daemon.ok(["exec", "two", "getent", "ahostsv4", "one"]);
    assert!(found.starts_with(&one), "{found}");
    daemon.ok(["rm", "-f", "one", "two"]);
    daemon.finish();
}

#[test]
fn a_dns_server_of_somebody_else_is_named() {
    let daemon = Daemon::start();
    // As dnsmasq does by default.
    let file = std::fs::File::open(daemon.namespace().file()).unwrap();
    let everywhere = std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        UdpSocket::bind("0.0.0.0:53").unwrap()
    });
    let everywhere = everywhere.join().unwrap();
    let refused = daemon.cli(["run", "--name", "web", IMAGE, "true"]).run();
    let said = text(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("cannot serve names on"),
        "{said}"
    );
    assert!(said.contains("hint: another DNS server has port 53"), "{said}");
    let doctor = text(&daemon.cli(["doctor"]).run().stdout);
    assert!(doctor.contains("cannot serve names on 0.0.0.0:53"), "{doctor}");
    // Those that need no names run all the same.
    daemon.ok(["run", "--rm", "--network", "none", IMAGE, "true"]);
    drop(everywhere);
    daemon.ok(["start", "-a", "web"]);
    daemon.ok(["rm", "web"]);
    daemon.finish();
}
