//! A daemon's side and a VM's side, and a zone that the test changes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use offshoot_model::{Network, NetworkName, VmId, VmName};
use offshoot_net::Namespace;
use offshoot_net::dns::{Addresses, DnsConfig, DnsServers, Sight, UpstreamAddress, Zone};

/// Whether network namespaces can be made here; says that the test is skipped if not.
pub(crate) fn possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    let dig = Command::new("dig").arg("-v").output().is_ok();
    if !(root && dig) {
        println!("SKIPPED: names with real clients: needs root and dig (bind9-dnsutils)");
    }
    root && dig
}

/// A namespace that ip-netns(8) knows; gone when dropped.
pub(crate) struct Netns(String);

impl Netns {
    fn make(what: &str) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ofs-dns-{what}-{}-{number}", std::process::id());
        ip(&["netns", "add", &name]);
        let made = Self(name);
        made.ip(&["link", "set", "lo", "up"]);
        made
    }

    fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.0], arguments].concat());
    }

    pub(crate) fn namespace(&self) -> Namespace {
        Namespace::named(&self.0).expect("the namespace")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip");
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// VMs as the test says they are.
#[derive(Default)]
pub(crate) struct Vms {
    network: Mutex<Option<Arc<Network>>>,
    vms: Mutex<HashMap<String, Addresses>>,
}

impl Vms {
    pub(crate) fn put(&self, name: &str, number: u8) {
        let addresses = Addresses {
            ipv4: [10, 87, 0, number].into(),
            ipv6: format!("fd12:3456:789a::{number:x}").parse().unwrap(),
        };
        self.vms.lock().unwrap().insert(name.to_owned(), addresses);
    }

    pub(crate) fn remove(&self, name: &str) {
        self.vms.lock().unwrap().remove(name).expect("such a VM");
    }
}

impl Zone for Vms {
    fn is_ready(&self) -> bool {
        true
    }

    fn addresses(&self, name: &str, _: Sight<'_>) -> Option<Addresses> {
        let vms = self.vms.lock().unwrap();
        vms.get(&name.to_ascii_lowercase()).copied()
    }

    fn name(&self, address: IpAddr, _: Sight<'_>) -> Option<VmName> {
        let vms = self.vms.lock().unwrap();
        let has = |addresses: &Addresses| {
            [IpAddr::V4(addresses.ipv4), IpAddr::V6(addresses.ipv6)].contains(&address)
        };
        let found = vms.iter().find(|(_, addresses)| has(addresses));
        found.map(|(name, _)| name.parse().unwrap())
    }

    fn networks(&self) -> Vec<Arc<Network>> {
        self.network.lock().unwrap().iter().cloned().collect()
    }
}

/// A server on a gateway, and a client on its network.
pub(crate) struct World {
    pub(crate) host: Netns,
    pub(crate) guest: Netns,
    pub(crate) vms: Arc<Vms>,
    pub(crate) network: Arc<Network>,
    pub(crate) servers: DnsServers,
    pub(crate) user: VmId,
}

pub(crate) const GATEWAY: &str = "10.87.0.1";
pub(crate) const GATEWAY6: &str = "fd12:3456:789a::1";

impl World {
    /// Nothing listens yet. Upstreams lie in the host's namespace.
    pub(crate) fn new(upstream: &[SocketAddr]) -> Self {
        let (host, guest) = (Netns::make("h"), Netns::make("g"));
        host.ip(&[
            "link", "add", "name", "br0", "type", "veth", "peer", "name", "eth0", "netns", &guest.0,
        ]);
        // No duplicate detection: an address is there at once.
        host.ip(&["addr", "add", "10.87.0.1/24", "dev", "br0"]);
        host.ip(&["addr", "add", "fd12:3456:789a::1/64", "dev", "br0", "nodad"]);
        host.ip(&["link", "set", "br0", "up"]);
        guest.ip(&["addr", "add", "10.87.0.2/24", "dev", "eth0"]);
        guest.ip(&["addr", "add", "fd12:3456:789a::2/64", "dev", "eth0", "nodad"]);
        // Somebody who is not of the network.
        guest.ip(&["addr", "add", "10.99.0.2/32", "dev", "eth0"]);
        guest.ip(&["link", "set", "eth0", "up"]);
        host.ip(&["route", "add", "10.99.0.2/32", "dev", "br0"]);
        let network = Arc::new(Network {
            name: NetworkName::default_network(),
            bridge: "br0".into(),
            ipv4: "10.87.0.0/24".parse().unwrap(),
            ipv6: "fd12:3456:789a::/64".parse().unwrap(),
            created_ms: 0,
        });
        let vms = Arc::new(Vms::default());
        *vms.network.lock().unwrap() = Some(Arc::clone(&network));
        vms.put("web", 2);
        vms.put("db", 3);
        let config = DnsConfig {
            domain: "vm.internal".parse().unwrap(),
            upstream: upstream.iter().copied().map(UpstreamAddress).collect(),
        };
        let servers = DnsServers::new(host.namespace(), config, Arc::clone(&vms) as Arc<dyn Zone>);
        Self {
            host,
            guest,
            vms,
            network,
            servers,
            user: VmId::from_bytes(&[7; 8]),
        }
    }

    /// The same, and the server listens.
    pub(crate) fn listening(upstream: &[SocketAddr]) -> Self {
        let world = Self::new(upstream);
        world
            .servers
            .ensure(&world.network, &world.user)
            .expect("listens");
        world
    }

    /// What `dig @GATEWAY ...` prints in the client's namespace.
    pub(crate) async fn dig(&self, arguments: &str) -> String {
        dig(&self.guest, arguments).await
    }
}

/// What `dig` prints, with its `status`; a test waits for no longer than its own patience.
pub(crate) async fn dig(netns: &Netns, arguments: &str) -> String {
    let mut command = tokio::process::Command::new("ip");
    command.args(["netns", "exec", &netns.0, "dig"]);
    if !arguments.contains('@') {
        command.arg(format!("@{GATEWAY}"));
    }
    // One attempt, with more patience than the server has.
    command.args(["+time=15", "+tries=1", "+nocookie"]);
    let output = command
        .args(arguments.split_whitespace())
        .output()
        .await
        .expect("dig");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
