//! A small world of network namespaces: the host with its bridges, VMs, and what lies outside.
//!
//! ```text
//!   vm a, b (network one) ─ ofs-…1 ┐
//!   vm c    (network two) ─ ofs-…2 ┴ host ─ up0 ── outside (198.51.100.2, 2001:db8::2, and 169.254.169.254)
//! ```

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use offshoot_model::{Attachment, Mac, Network, PublishedPort, Transport};
use offshoot_net::Namespace;
use offshoot_net::firewall::{Firewall, Guarded, TableName};
use offshoot_net::links::{BridgePlan, Links};

/// What will not come is waited for this long. What comes is there at once; a busy machine has its time.
const PATIENCE: Duration = Duration::from_millis(1500);

pub(crate) const OUTSIDE: &str = "198.51.100.2";
pub(crate) const OUTSIDE6: &str = "2001:db8::2";
pub(crate) const UPLINK: &str = "198.51.100.1";
pub(crate) const UPLINK6: &str = "2001:db8::1";
pub(crate) const METADATA: &str = "169.254.169.254";

/// Whether this test can make namespaces. Says so when it cannot.
pub(crate) fn possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("skipped: needs root");
        }
    }
    root
}

/// A namespace with a name of its own, which goes with it.
pub(crate) struct Place {
    name: String,
    pub(crate) namespace: Namespace,
}

impl Place {
    pub(crate) fn new(what: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("oft-{}-{number}-{what}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let namespace = Namespace::named(&name).expect("a namespace");
        let place = Self { name, namespace };
        // Addresses are there at once, the kernel's own as well.
        for which in ["all", "default"] {
            place.set(&format!("ipv6/conf/{which}/accept_dad"), "0");
        }
        place.set("ipv4/ping_group_range", "0 0");
        place.ip("link set lo up");
        place
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `ip WORDS` in it.
    pub(crate) fn ip(&self, words: &str) -> String {
        let words: Vec<_> = words.split(' ').collect();
        run("ip", &[&["-n", &self.name], words.as_slice()].concat())
    }

    /// A program in it.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        run("ip", &[&["netns", "exec", &self.name], words].concat())
    }

    /// A switch of it, such as `ipv4/conf/all/forwarding`.
    pub(crate) fn switch(&self, name: &str) -> String {
        let text = self
            .namespace
            .run(|| std::fs::read_to_string(format!("/proc/sys/net/{name}")));
        text.unwrap().unwrap_or_default().trim().to_owned()
    }

    fn set(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.namespace
            .run(|| std::fs::write(path, value))
            .unwrap()
            .unwrap();
    }

    /// Answers each TCP connection and each UDP datagram at `port` with the address that it came from.
    pub(crate) fn serve(&self, port: u16) {
        let (tcp, udp) = self
            .namespace
            .run(|| (TcpListener::bind(("::", port)), UdpSocket::bind(("::", port))))
            .unwrap();
        let (tcp, udp) = (tcp.unwrap(), udp.unwrap());
        std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = tcp.accept() {
                let _ = stream.write_all(peer.ip().to_canonical().to_string().as_bytes());
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(peer.ip().to_canonical().to_string().as_bytes(), peer);
            }
        });
    }

    /// Who a server sees when it is asked from here; nothing when it cannot be reached.
    pub(crate) fn ask(&self, transport: Transport, address: &str, port: u16) -> Option<String> {
        let address: IpAddr = address.parse().unwrap();
        let to = SocketAddr::new(address, port);
        let asked = self.namespace.run(|| match transport {
            Transport::Tcp => {
                let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut text = String::new();
                stream.read_to_string(&mut text).map(|_| text)
            }
            Transport::Udp => {
                let any: IpAddr = if to.is_ipv4() {
                    [0; 4].into()
                } else {
                    [0_u16; 8].into()
                };
                let socket = UdpSocket::bind((any, 0))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.connect(to)?;
                socket.send(b"?")?;
                let mut buffer = [0; 64];
                let len = socket.recv(&mut buffer)?;
                Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
            }
        });
        asked.unwrap().ok().filter(|text| !text.is_empty())
    }

    pub(crate) fn tcp(&self, address: &str, port: u16) -> Option<String> {
        self.ask(Transport::Tcp, address, port)
    }

    /// Whether an ICMP echo request is answered.
    pub(crate) fn pings(&self, address: &str) -> bool {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
        let address: IpAddr = address.parse().unwrap();
        let (family, protocol, request) = match address {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128),
        };
        let answered = self.namespace.run(|| {
            let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(protocol))?;
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect((address, 0))?;
            socket.send(&[request, 0, 0, 0, 0, 0, 0, 1])?;
            socket.recv(&mut [0; 64])
        });
        answered.unwrap().is_ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Runs a program that must succeed.
fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().expect(program);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A VM that is played by a namespace.
pub(crate) struct Guest {
    pub(crate) place: Place,
    pub(crate) network: Network,
    pub(crate) vm: Guarded,
}

impl Guest {
    pub(crate) fn ipv4(&self) -> String {
        self.vm.attachment.ipv4.to_string()
    }

    pub(crate) fn ipv6(&self) -> String {
        self.vm.attachment.ipv6.to_string()
    }
}

/// The host, and what lies outside.
pub(crate) struct World {
    pub(crate) host: Place,
    pub(crate) outside: Place,
    pub(crate) firewall: Firewall,
    pub(crate) networks: [Network; 2],
}

impl World {
    pub(crate) async fn new() -> Self {
        let (host, outside) = (Place::new("host"), Place::new("out"));
        host.ip(&format!(
            "link add up0 type veth peer name eth0 netns {}",
            outside.name
        ));
        outside.ip(&format!("addr add {OUTSIDE}/24 dev eth0"));
        outside.ip(&format!("addr add {OUTSIDE6}/64 dev eth0 nodad"));
        outside.ip(&format!("addr add {METADATA}/32 dev lo"));
        outside.ip("link set eth0 up");
        host.ip(&format!("addr add {UPLINK}/24 dev up0"));
        host.ip(&format!("addr add {UPLINK6}/64 dev up0 nodad"));
        host.ip("link set up0 up");
        host.ip(&format!("route add default via {OUTSIDE}"));
        host.ip(&format!("route add default via {OUTSIDE6} dev up0"));
        let networks = [1_u8, 2].map(|number| Network {
            name: format!("n{number}").parse().unwrap(),
            bridge: format!("ofs-0000000{number}"),
            ipv4: format!("10.231.{number}.0/24").parse().unwrap(),
            ipv6: format!("fd00:231:{number}::/64").parse().unwrap(),
            created_ms: 0,
        });
        let links = Links::open(host.namespace.clone()).unwrap();
        for (number, network) in networks.iter().enumerate() {
            let plan = BridgePlan {
                name: network.bridge.clone(),
                mac: Mac([0x06, 0x6f, 0, 0, 0, number as u8]),
                ipv4: (network.gateway4(), network.ipv4),
                ipv6: (network.gateway6(), network.ipv6),
                mtu: 1500,
            };
            links.ensure_bridge(&plan).await.unwrap();
        }
        let firewall = Firewall::new(host.namespace.clone(), TableName::new([0xab, 0, 0, 1]));
        Self {
            host,
            outside,
            firewall,
            networks,
        }
    }

    /// What VM `number` of a network is given, with nothing special about it.
    pub(crate) fn guarded(&self, network: usize, number: u8) -> (Network, Guarded) {
        let chosen = self.networks[network].clone();
        let attachment = Attachment {
            network: chosen.name.clone(),
            mac: Mac([0x02, 0x6f, 10, 231, network as u8 + 1, number]),
            ipv4: format!("10.231.{}.{number}", network + 1).parse().unwrap(),
            ipv6: format!("fd00:231:{}::{number:x}", network + 1).parse().unwrap(),
            publish: Vec::new(),
        };
        let vm = Guarded {
            tap: format!("os-{network:04x}{number:08x}"),
            attachment,
            nat: true,
            isolate: false,
            host: false,
            metadata: false,
        };
        (chosen, vm)
    }

    /// A VM on a network, behind the firewall, with what `change` makes of it.
    pub(crate) async fn guest(&self, network: usize, number: u8, change: impl FnOnce(&mut Guarded)) -> Guest {
        self.guest_of(&self.firewall, network, number, change).await
    }

    /// The same, behind another daemon's firewall.
    pub(crate) async fn guest_of(
        &self,
        firewall: &Firewall,
        network: usize,
        number: u8,
        change: impl FnOnce(&mut Guarded),
    ) -> Guest {
        let (network, mut vm) = self.guarded(network, number);
        change(&mut vm);
        let place = Place::new(&format!("vm{number}"));
        let (tap, bridge, given) = (&vm.tap, &network.bridge, &vm.attachment);
        self.host.ip(&format!(
            "link add {tap} type veth peer name eth0 netns {}",
            place.name
        ));
        self.host.ip(&format!("link set {tap} master {bridge} up"));
        place.ip(&format!("link set eth0 address {}", given.mac));
        place.ip(&format!("addr add {}/24 dev eth0", given.ipv4));
        place.ip(&format!("addr add {}/64 dev eth0 nodad", given.ipv6));
        place.ip("link set eth0 up");
        place.ip(&format!("route add default via {}", network.gateway4()));
        place.ip(&format!("route add default via {}", network.gateway6()));
        let inserted = firewall.insert(vec![(network.clone(), vm.clone())]).await;
        inserted.expect("a firewall");
        Guest { place, network, vm }
    }

    /// Whether bridged packets pass the rules for routed ones, too, as they do where Docker loaded `br_netfilter`.
    pub(crate) fn filter_bridged(&self, on: bool) {
        for family in ["iptables", "ip6tables"] {
            let name = format!("bridge/bridge-nf-call-{family}");
            // A host without that module does not do it.
            if !self.host.switch(&name).is_empty() {
                self.host.set(&name, if on { "1" } else { "0" });
            }
        }
    }

    pub(crate) fn rules(&self) -> String {
        self.host.run(&["nft", "list", "ruleset"])
    }
}

/// `-p` as people write it.
pub(crate) fn publish(address: Option<&str>, host: u16, guest: u16, transport: Transport) -> PublishedPort {
    PublishedPort {
        address: address.map(|address| address.parse().unwrap()),
        host,
        guest,
        transport,
    }
}
