//! The guest's network device: found, named, and given what the daemon has decided, over rtnetlink(7).
//!
//! ```text
//!   NetworkInterface ── plan ──► NetworkPlan ── set_up ──► eth0: addresses, up, default routes
//!                                     └──────── names  ──► resolv.conf, hosts
//! ```
//!
//! Nothing is asked of the network: no DHCP, no router advertisements, no search for duplicates. The daemon gave the
//! addresses, and its bridge lets nobody else use them.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt as _;
use ipnet::IpNet;
use offshoot_agent_proto::v1;
use offshoot_model::Mac;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{LinkAttribute, State};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::{ConfigureError, Stages, disk};
use crate::{log, modules};

/// How the device is called, as in every container.
const DEVICE: &str = "eth0";

/// Its name for a moment. A device that was renamed is one that udev lets keep its name (systemd.link(5), `keep`), and
/// the kernel itself calls it `eth0` at first.
const DEVICE_BEFORE: &str = "offshoot0";

/// Where the kernel shows network devices.
const DEVICES: &str = "/sys/class/net";

/// Where IPv6 is set; not there in a kernel without it.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// What the device does not do by itself. A link-local address it has at once.
const IPV6_OFF: [&str; 3] = ["accept_ra", "autoconf", "accept_dad"];

/// How long the link is waited for: the kernel looks at links at most once a second.
const LINK_PATIENCE: Duration = Duration::from_secs(2);

/// The most addresses; a VM has one of each family.
const MAX_ADDRESSES: usize = 16;
/// The most name servers: resolv.conf(5) knows three (`MAXNS`).
const MAX_NAMESERVERS: usize = 3;
/// The longest domain (RFC 1035, section 2.3.4).
const MAX_DOMAIN: usize = 253;
/// The longest label of one.
const MAX_LABEL: usize = 63;

/// What the device gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NetworkPlan {
    mac: Mac,
    /// What the device's address is until it is set up: another one in a guest that was restored.
    pub(super) mac_before: Mac,
    /// Its addresses with their networks' prefixes.
    pub(super) addresses: Vec<IpNet>,
    gateways: Vec<IpAddr>,
    /// For resolv.conf(5), in order.
    pub(super) nameservers: Vec<IpAddr>,
    /// The domain that the guest's own name is below; none when empty.
    pub(super) domain: String,
}

/// Decides what the device gets, or says what is wrong with the request.
pub(super) fn plan(request: &v1::NetworkInterface) -> Result<NetworkPlan, String> {
    let mac: Mac = request
        .mac
        .parse()
        .map_err(|error| format!("the network's device: {error}"))?;
    if mac.0[0] & 1 == 1 {
        return Err(format!("the MAC address {mac} is for groups"));
    }
    if request.addresses.is_empty() || request.addresses.len() > MAX_ADDRESSES {
        return Err(format!("a network device has 1 to {MAX_ADDRESSES} addresses"));
    }
    let addresses = request.addresses.iter().map(|text| {
        let address: Option<IpNet> = text.parse().ok();
        let usable = |net: &IpNet| net.prefix_len() > 0 && is_a_machines(net.addr());
        address
            .filter(usable)
            .ok_or_else(|| format!("{text:?} is no address of a machine with its network's prefix"))
    });
    let addresses: Vec<IpNet> = addresses.collect::<Result<_, _>>()?;
    let gateways = machines("gateway", &request.gateways, 2)?;
    if let [first, second] = gateways[..]
        && first.is_ipv4() == second.is_ipv4()
    {
        return Err(format!("{first} and {second} are gateways of one family"));
    }
    for gateway in &gateways {
        if !addresses.iter().any(|net| net.contains(gateway)) {
            return Err(format!(
                "the gateway {gateway} is on none of the device's networks"
            ));
        }
    }
    let nameservers = machines("name server", &request.nameservers, MAX_NAMESERVERS)?;
    if !request.domain.is_empty() && !is_domain(&request.domain) {
        return Err(format!("{:?} is no domain", request.domain));
    }
    Ok(NetworkPlan {
        mac,
        mac_before: mac,
        addresses,
        gateways,
        nameservers,
        domain: request.domain.clone(),
    })
}

/// The addresses of other machines, at most so many.
fn machines(what: &str, texts: &[String], most: usize) -> Result<Vec<IpAddr>, String> {
    if texts.len() > most {
        return Err(format!("more than {most} addresses of a {what}"));
    }
    let parse = |text: &String| text.parse().ok().filter(|address| is_a_machines(*address));
    let parsed = texts
        .iter()
        .map(|text| parse(text).ok_or_else(|| format!("{text:?} is no address of a {what}")));
    parsed.collect()
}

/// Whether one machine of a network can have this address.
fn is_a_machines(address: IpAddr) -> bool {
    let for_all = match address {
        IpAddr::V4(address) => address.is_broadcast(),
        IpAddr::V6(_) => false,
    };
    !(for_all || address.is_unspecified() || address.is_multicast() || address.is_loopback())
}

/// Whether a text is a domain that can stand in resolv.conf(5).
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    text.len() <= MAX_DOMAIN && text.split('.').all(label)
}

/// Gives the device what was decided; returns the timed steps. Blocks.
pub(super) fn set_up(plan: &NetworkPlan) -> Result<Vec<v1::GuestStage>, ConfigureError> {
    let mut stages = Stages::new();
    let look = || find_in(Path::new(DEVICES), plan.mac_before);
    let index = match look() {
        // A rehearsal loaded its driver.
        Some(index) => index,
        None => {
            modules::load_group(Path::new(modules::FOLDER), modules::NET);
            disk::wait_for(&format!("the network device {}", plan.mac_before), look)?
        }
    };
    stages.end("network-device");
    runtime()?.block_on(async {
        let handle = kernel()?;
        configure(plan, &handle, index).await?;
        stages.end("network");
        wait_for_link(&handle, index).await?;
        stages.end("network-link");
        Ok::<(), ConfigureError>(())
    })?;
    Ok(stages.done)
}

/// Loads the driver and waits for the device, so that who is set up later need not.
pub(super) fn rehearse() -> Result<(), ConfigureError> {
    modules::load_group(Path::new(modules::FOLDER), modules::NET);
    let there = || {
        let entries = fs::read_dir(DEVICES).ok()?;
        let mut others = entries.flatten().filter(|entry| entry.file_name() != "lo");
        let index = fs::read_to_string(others.next()?.path().join("ifindex")).ok()?;
        index.trim_end().parse().ok()
    };
    let index = disk::wait_for("the network device", there)?;
    runtime()?.block_on(async {
        let handle = kernel()?;
        name_it(&handle, index).await
    })
}

/// Brings the device up and down once, where there is one: what the kernel does for that is then in memory, and translated where
/// it is emulated. The device is as it was.
pub(super) fn warm() -> Result<(), ConfigureError> {
    let index = fs::read_to_string(format!("{DEVICES}/{DEVICE}/ifindex")).ok();
    let Some(index) = index.and_then(|text| text.trim_end().parse().ok()) else {
        return Ok(());
    };
    runtime()?.block_on(async {
        let handle = kernel()?;
        for link in [
            LinkUnspec::new_with_index(index).up(),
            LinkUnspec::new_with_index(index).down(),
        ] {
            let set = handle.link().set(link.build()).execute().await;
            step(set, || format!("bring {DEVICE} up and down"))?;
        }
        Ok(())
    })
}

/// A conversation with the kernel, which ends with the runtime that this is called in.
fn kernel() -> Result<Handle, ConfigureError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(ConfigureError::step("talk to the kernel about the network"))?;
    tokio::spawn(connection);
    Ok(handle)
}

fn runtime() -> Result<tokio::runtime::Runtime, ConfigureError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(ConfigureError::step("talk to the kernel about the network"))
}

/// Names the device, and keeps it from doing anything by itself.
async fn name_it(handle: &Handle, index: u32) -> Result<(), ConfigureError> {
    for name in [DEVICE_BEFORE, DEVICE] {
        let link = LinkUnspec::new_with_index(index).name(name).build();
        let renamed = handle.link().set(link).execute().await;
        step(renamed, || format!("name the network device {name}"))?;
    }
    if has_ipv6() {
        for name in IPV6_OFF {
            let path = format!("{IPV6}/{DEVICE}/{name}");
            fs::write(&path, "0").map_err(ConfigureError::step(format!("write {path}")))?;
        }
    }
    Ok(())
}

fn has_ipv6() -> bool {
    fs::exists(IPV6).unwrap_or(false)
}

/// The index of the device with a MAC address.
fn find_in(devices: &Path, mac: Mac) -> Option<u32> {
    let entries = fs::read_dir(devices).ok()?;
    entries.flatten().find_map(|entry| {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let address: Mac = read("address")?.trim_end().parse().ok()?;
        if address != mac {
            return None;
        }
        read("ifindex")?.trim_end().parse().ok()
    })
}

async fn configure(plan: &NetworkPlan, handle: &Handle, index: u32) -> Result<(), ConfigureError> {
    if plan.mac != plan.mac_before {
        let link = LinkUnspec::new_with_index(index)
            .address(plan.mac.0.to_vec())
            .build();
        step(handle.link().set(link).execute().await, || {
            format!("give the network device the address {}", plan.mac)
        })?;
    } else {
        // A rehearsal did.
        name_it(handle, index).await?;
    }
    let has_ipv6 = has_ipv6();
    if !has_ipv6 {
        log::warning("the kernel has no IPv6; the VM has its IPv4 address alone");
    }
    let possible = |address: IpAddr| address.is_ipv4() || has_ipv6;
    for net in plan.addresses.iter().filter(|net| possible(net.addr())) {
        add_address(handle, index, *net).await?;
    }
    let up = LinkUnspec::new_with_index(index).up().build();
    step(handle.link().set(up).execute().await, || {
        format!("bring {DEVICE} up")
    })?;
    for gateway in plan.gateways.iter().filter(|gateway| possible(**gateway)) {
        add_default_route(handle, index, *gateway).await?;
    }
    Ok(())
}

/// Waits until the kernel has noticed that the device has its link; before, IPv6 does not use it. By itself it looks at
/// most once a second, but it looks at a device that it is asked about (`rtnl_getlink`, Linux 6.8). Without a link the VM
/// is still one; whoever holds the other end may come later.
async fn wait_for_link(handle: &Handle, index: u32) -> Result<(), ConfigureError> {
    let link = async {
        loop {
            let mut replies = handle.link().get().match_index(index).execute();
            let reply = replies.try_next().await?;
            let attributes = reply.map_or_else(Vec::new, |message| message.attributes);
            if attributes.contains(&LinkAttribute::OperState(State::Up)) {
                return Ok::<(), rtnetlink::Error>(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(LINK_PATIENCE, link).await {
        Ok(asked) => step(asked, || format!("ask for the state of {DEVICE}")),
        Err(_) => {
            log::warning(format_args!("{DEVICE} has no link"));
            Ok(())
        }
    }
}

async fn add_address(handle: &Handle, index: u32, net: IpNet) -> Result<(), ConfigureError> {
    let mut request = handle.address().add(index, net.addr(), net.prefix_len());
    if net.addr().is_ipv6() {
        // Usable at once.
        request.message_mut().header.flags = AddressHeaderFlags::Nodad;
    }
    step(request.execute().await, || {
        format!("give {DEVICE} the address {net}")
    })
}

async fn add_default_route(handle: &Handle, index: u32, gateway: IpAddr) -> Result<(), ConfigureError> {
    let route = match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(index)
            .build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
            .gateway(gateway)
            .output_interface(index)
            .build(),
    };
    step(handle.route().add(route).execute().await, || {
        format!("add the default route over {gateway}")
    })
}

/// What the kernel said to a step.
fn step(said: Result<(), rtnetlink::Error>, action: impl FnOnce() -> String) -> Result<(), ConfigureError> {
    said.map_err(|error| {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        ConfigureError::step(action())(source)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> v1::NetworkInterface {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        v1::NetworkInterface {
            mac: "02:00:0a:57:00:02".into(),
            addresses: texts(&["10.87.0.2/24", "fd00:57::2/64"]),
            gateways: texts(&["10.87.0.1", "fd00:57::1"]),
            nameservers: texts(&["10.87.0.1", "fd00:57::1"]),
            domain: "vm.internal".into(),
        }
    }

    #[test]
    fn what_the_daemon_sends_is_planned() {
        let plan = plan(&request()).unwrap();
        assert_eq!(plan.mac, Mac([2, 0, 10, 87, 0, 2]));
        assert_eq!(plan.addresses[0].to_string(), "10.87.0.2/24");
        assert_eq!(plan.gateways[1].to_string(), "fd00:57::1");
        assert_eq!((plan.nameservers.len(), plan.domain.as_str()), (2, "vm.internal"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let check = |change: &dyn Fn(&mut v1::NetworkInterface), fine: bool| {
            let mut request = request();
            change(&mut request);
            assert_eq!(plan(&request).is_ok(), fine, "{request:?}");
        };
        check(&|_| (), true);
        check(&|request| request.domain = String::new(), true);
        check(&|request| request.gateways = Vec::new(), true);
        check(&|request| request.nameservers = Vec::new(), true);
        for mac in ["", "02:00", "01:00:5e:00:00:01"] {
            check(&|request| request.mac = mac.into(), false);
        }
        for address in [
            "",
            "10.87.0.2",
            "10.87.0.2/33",
            "10.87.0.2/0",
            "127.0.0.1/8",
            "::1/128",
            "ff02::1/64",
            "0.0.0.0/8",
        ] {
            check(&|request| request.addresses.push(address.into()), false);
        }
        check(&|request| request.addresses = Vec::new(), false);
        check(
            &|request| request.addresses = vec!["10.87.0.2/24".into(); MAX_ADDRESSES + 1],
            false,
        );
        for gateways in [
            &["10.87.1.1"][..],
            &["10.87.0.1", "10.87.0.3"],
            &["x"],
            &["10.87.0.1", "fd00:57::1", "10.87.0.3"],
        ] {
            check(
                &|request| request.gateways = gateways.iter().map(ToString::to_string).collect(),
                false,
            );
        }
        check(&|request| request.nameservers = vec!["10.0.0.1".into(); 4], false);
        check(&|request| request.nameservers = vec!["10.0.0.1\n".into()], false);
        for domain in ["a b", "a\nnameserver 1.1.1.1", ".", "a.", "a..b", &"a".repeat(64)] {
            check(&|request| request.domain = domain.into(), false);
        }
        check(
            &|request| request.domain = format!("{}a", "abc.".repeat(64)),
            false,
        );
    }

    proptest! {
        #[test]
        fn no_request_breaks_the_plan(
            mac in ".{0,20}", addresses in prop::collection::vec(".{0,20}", 0..3), domain in ".{0,300}",
        ) {
            let request = v1::NetworkInterface { mac, addresses: addresses.clone(), domain, ..request() };
            drop(plan(&request));
            drop(plan(&v1::NetworkInterface { addresses, ..self::request() }));
        }
    }

    #[test]
    fn devices_are_found_by_their_address() {
        let devices = tempfile::tempdir().unwrap();
        for (name, address, index) in [
            ("lo", "00:00:00:00:00:00\n", "1\n"),
            ("eth0", "02:00:0a:57:00:02\n", "7\n"),
        ] {
            let folder = devices.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("address"), address).unwrap();
            fs::write(folder.join("ifindex"), index).unwrap();
        }
        fs::write(devices.path().join("bonding_masters"), "").unwrap();
        assert_eq!(find_in(devices.path(), Mac([2, 0, 10, 87, 0, 2])), Some(7));
        assert_eq!(find_in(devices.path(), Mac([2, 0, 10, 87, 0, 3])), None);
    }
}
