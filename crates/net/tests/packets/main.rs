//! The firewall between real stacks: namespaces play the host, VMs and what lies outside. Needs root.

mod frames;
mod spoofing;
mod world;

use offshoot_model::Transport;
use offshoot_net::firewall::{Changes, Firewall, TableName};
use world::{METADATA, OUTSIDE, OUTSIDE6, Place, UPLINK, UPLINK6, World, possible, publish};

#[tokio::test]
async fn a_vm_reaches_what_lies_beyond_by_the_address_of_the_host() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    world.outside.serve(80);
    let a = world.guest(0, 10, |_| {}).await;
    let b = world.guest(0, 11, |vm| vm.nat = false).await;
    for transport in [Transport::Tcp, Transport::Udp] {
        assert_eq!(a.place.ask(transport, OUTSIDE, 80).as_deref(), Some(UPLINK));
        assert_eq!(a.place.ask(transport, OUTSIDE6, 80).as_deref(), Some(UPLINK6));
    }
    assert_eq!(b.place.tcp(OUTSIDE, 80), None, "--no-nat");
    assert_eq!(b.place.tcp(OUTSIDE6, 80), None, "--no-nat");
    // On its network it is at home all the same.
    a.place.serve(81);
    assert_eq!(b.place.tcp(&a.ipv4(), 81), Some(b.ipv4()));
    assert_eq!(b.place.tcp(&a.ipv6(), 81), Some(b.ipv6()));
}

#[tokio::test]
async fn a_published_port_is_there_for_all_and_no_other_port_for_anybody() {
    if !possible() {
        return;
    }
    for bridged in [false, true] {
        let world = World::new().await;
        world.filter_bridged(bridged);
        published(world, bridged).await;
    }
}

async fn published(world: World, bridged: bool) {
    let ports = vec![
        publish(None, 8080, 80, Transport::Tcp),
        publish(None, 8053, 53, Transport::Udp),
        publish(Some(UPLINK), 8081, 80, Transport::Tcp),
        publish(Some("127.0.0.1"), 8082, 80, Transport::Tcp),
    ];
    let a = world.guest(0, 10, |vm| vm.attachment.publish = ports).await;
    let (b, c) = (world.guest(0, 11, |_| {}).await, world.guest(1, 12, |_| {}).await);
    let shy = world.guest(0, 13, |vm| vm.isolate = true).await;
    for port in [80, 81, 53] {
        a.place.serve(port);
    }
    let (outside, host) = (&world.outside, &world.host);
    // From outside, who asks is seen.
    assert_eq!(outside.tcp(UPLINK, 8080).as_deref(), Some(OUTSIDE));
    assert_eq!(outside.tcp(UPLINK6, 8080).as_deref(), Some(OUTSIDE6));
    assert_eq!(
        outside.ask(Transport::Udp, UPLINK, 8053).as_deref(),
        Some(OUTSIDE)
    );
    assert_eq!(outside.tcp(UPLINK, 8081).as_deref(), Some(OUTSIDE));
    // From the host by any address of it.
    let gateway = world.networks[0].gateway4().to_string();
    assert_eq!(host.tcp("127.0.0.1", 8080), Some(gateway.clone()));
    assert_eq!(host.ask(Transport::Udp, "127.0.0.1", 8053), Some(gateway.clone()));
    assert_eq!(host.tcp("127.0.0.1", 8082), Some(gateway.clone()));
    assert_eq!(host.tcp(UPLINK, 8080).as_deref(), Some(UPLINK));
    assert_eq!(host.tcp(UPLINK, 8081).as_deref(), Some(UPLINK));
    // Other VMs, by the host's address.
    assert_eq!(b.place.tcp(UPLINK, 8080), Some(gateway.clone()));
    // Where bridged packets are translated, too, a bridge does not send one back to where it came from.
    if !bridged {
        assert_eq!(a.place.tcp(UPLINK, 8080), Some(gateway.clone()), "itself");
    }
    assert_eq!(c.place.tcp(UPLINK, 8080), Some(c.ipv4()), "of another network");
    assert_eq!(shy.place.tcp(UPLINK, 8080), None, "--isolate");

    // An address is that address alone.
    assert_eq!(host.tcp("127.0.0.1", 8081), None);
    assert_eq!(host.tcp(UPLINK, 8082), None);
    assert_eq!(outside.tcp(UPLINK, 8082), None);
    // A protocol is that protocol alone.
    assert_eq!(outside.tcp(UPLINK, 8053), None);
    // Nobody gets in who is not let in, even if he knows the way.
    outside.ip(&format!("route add 10.231.1.0/24 via {UPLINK}"));
    outside.ip(&format!("route add fd00:231:1::/64 via {UPLINK6}"));
    for port in [80, 81] {
        assert_eq!(outside.tcp(&a.ipv4(), port), None);
        assert_eq!(outside.tcp(&a.ipv6(), port), None);
    }
    assert_eq!(outside.tcp(UPLINK, 81), None);
    // A loopback address is the host's own, also where it is routed.
    outside.run(&["sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1"]);
    outside.ip("route flush table local exact 127.0.0.0/8");
    outside.ip("addr del 127.0.0.1/8 dev lo");
    outside.ip(&format!("route add 127.0.0.1 via {UPLINK}"));
    assert_eq!(outside.tcp("127.0.0.1", 8082), None);

    // The port goes with the VM.
    world.firewall.remove(a.vm.tap.clone()).await.unwrap();
    assert_eq!(outside.tcp(UPLINK, 8080), None);
    assert_eq!(host.tcp("127.0.0.1", 8080), None);
}

#[tokio::test]
async fn networks_and_isolated_vms_are_kept_apart() {
    if !possible() {
        return;
    }
    for bridged in [false, true] {
        let world = World::new().await;
        world.filter_bridged(bridged);
        kept_apart(world).await;
    }
}

async fn kept_apart(world: World) {
    let (a, b) = (world.guest(0, 10, |_| {}).await, world.guest(0, 11, |_| {}).await);
    let shy = world.guest(0, 12, |vm| vm.isolate = true).await;
    let other = world.guest(1, 13, |_| {}).await;
    for guest in [&a, &shy, &other] {
        guest.place.serve(80);
    }
    world.outside.serve(80);
    assert_eq!(b.place.tcp(&a.ipv4(), 80), Some(b.ipv4()));
    assert_eq!(b.place.tcp(&a.ipv6(), 80), Some(b.ipv6()));
    assert_eq!(b.place.ask(Transport::Udp, &a.ipv4(), 80), Some(b.ipv4()));
    for address in [other.ipv4(), other.ipv6(), shy.ipv4(), shy.ipv6()] {
        assert_eq!(b.place.tcp(&address, 80), None, "{address}");
    }
    for address in [a.ipv4(), a.ipv6()] {
        assert_eq!(shy.place.tcp(&address, 80), None, "{address}");
    }
    // Nor by the host, which would route between them.
    shy.place.ip("route del 10.231.1.0/24 dev eth0");
    shy.place.ip("route add 10.231.1.1 dev eth0");
    shy.place.ip("route replace default via 10.231.1.1");
    assert_eq!(shy.place.tcp(&a.ipv4(), 80), None);
    assert_eq!(shy.place.tcp(OUTSIDE, 80).as_deref(), Some(UPLINK));
}

#[tokio::test]
async fn the_host_and_the_clouds_metadata_are_closed_unless_allowed() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    let (host, outside) = (&world.host, &world.outside);
    for port in [22, 53] {
        host.serve(port);
    }
    outside.serve(80);
    let plain = world.guest(0, 10, |_| {}).await;
    let friend = world.guest(0, 11, |vm| vm.host = true).await;
    let cloudy = world.guest(0, 12, |vm| vm.metadata = true).await;
    let gateways = [
        world.networks[0].gateway4().to_string(),
        world.networks[0].gateway6().to_string(),
    ];
    let strange = world.networks[1].gateway4().to_string();
    for gateway in &gateways {
        assert!(plain.place.pings(gateway), "{gateway}");
        for transport in [Transport::Tcp, Transport::Udp] {
            assert!(plain.place.ask(transport, gateway, 53).is_some(), "{gateway}");
            assert_eq!(plain.place.ask(transport, gateway, 22), None, "{gateway}");
        }
        assert!(friend.place.tcp(gateway, 22).is_some(), "--allow host");
    }
    for address in [UPLINK, UPLINK6, strange.as_str()] {
        assert_eq!(plain.place.tcp(address, 22), None, "{address}");
        assert_eq!(plain.place.tcp(address, 53), None, "{address}");
        assert!(friend.place.tcp(address, 22).is_some(), "{address}");
    }
    host.ip(&format!("route add {METADATA} via {OUTSIDE}"));
    assert!(host.tcp(METADATA, 80).is_some());
    assert_eq!(plain.place.tcp(METADATA, 80), None);
    assert_eq!(friend.place.tcp(METADATA, 80), None);
    assert_eq!(cloudy.place.tcp(METADATA, 80).as_deref(), Some(UPLINK));
    assert_eq!(cloudy.place.tcp(UPLINK, 22), None);
    // Some clouds' agents have it on the host itself.
    host.ip(&format!("addr add {METADATA}/32 dev lo"));
    assert_eq!(plain.place.tcp(METADATA, 22), None);
    assert!(cloudy.place.tcp(METADATA, 22).is_some());
    // The host reaches its VMs.
    plain.place.serve(80);
    assert!(host.tcp(&plain.ipv4(), 80).is_some());
    assert!(host.tcp(&plain.ipv6(), 80).is_some());
}

#[tokio::test]
async fn rules_of_others_stay_and_ours_go_with_the_last_vm() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    world.host.run(&[
        "nft",
        "add table inet theirs; add chain inet theirs c { type filter hook forward priority 10; policy accept; }; add rule inet theirs c counter accept",
    ]);
    let switches = || {
        [
            "ipv4/conf/up0/forwarding",
            "ipv6/conf/up0/force_forwarding",
            "ipv6/conf/all/forwarding",
            "ipv4/conf/all/forwarding",
            "ipv6/conf/up0/accept_ra",
        ]
        .map(|name| world.host.switch(name))
    };
    let theirs = || world.host.run(&["nft", "-s", "list", "table", "inet", "theirs"]);
    let (before, switched, others) = (world.rules(), switches(), theirs());
    let a = world.guest(0, 10, |_| {}).await;
    let b = world.guest(0, 11, |_| {}).await;
    assert_eq!(world.host.switch("ipv4/conf/up0/forwarding"), "1");
    assert_eq!(
        world.host.switch("ipv4/conf/all/forwarding"),
        "0",
        "the others stay as they were"
    );
    world.outside.serve(80);
    assert!(a.place.tcp(OUTSIDE, 80).is_some());
    assert_eq!(theirs(), others);
    world.firewall.remove(a.vm.tap.clone()).await.unwrap();
    assert!(b.place.tcp(OUTSIDE, 80).is_some());
    world.firewall.remove(b.vm.tap.clone()).await.unwrap();
    assert!(!world.rules().contains("offshoot_"), "{}", world.rules());
    assert_eq!(before.contains("theirs"), world.rules().contains("theirs"));
    assert_eq!(theirs(), others);
    assert_eq!(switches(), switched);
}

#[tokio::test]
async fn a_daemon_that_comes_after_a_killed_one_makes_the_rules_what_they_should_be() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    world.outside.serve(80);
    let a = world.guest(0, 10, |_| {}).await;
    let gone = world.guest(0, 11, |_| {}).await;
    // It knows nothing of what the first one did, but finds it.
    let next = Firewall::new(world.host.namespace.clone(), world.firewall.table().clone());
    assert!(next.is_left_over().await.unwrap());
    next.insert(vec![(a.network.clone(), a.vm.clone())])
        .await
        .unwrap();
    assert!(a.place.tcp(OUTSIDE, 80).is_some());
    assert_eq!(gone.place.tcp(OUTSIDE, 80), None);
    // Somebody flushes everything, as `systemctl restart nftables` does.
    world.host.run(&["nft", "flush", "ruleset"]);
    assert!(next.refresh().await.unwrap());
    assert!(!next.refresh().await.unwrap());
    assert!(a.place.tcp(OUTSIDE, 80).is_some());
    // Or changes ours: the next change makes them whole.
    world
        .host
        .run(&["nft", "delete", "table", "inet", next.table().as_str()]);
    next.insert(vec![(gone.network.clone(), gone.vm.clone())])
        .await
        .unwrap();
    assert!(gone.place.tcp(OUTSIDE, 80).is_some());
    next.remove(gone.vm.tap.clone()).await.unwrap();
    next.remove(a.vm.tap.clone()).await.unwrap();
    assert_eq!(
        world.host.switch("ipv4/conf/up0/forwarding"),
        "0",
        "what the first one turned on"
    );
    assert!(!next.is_left_over().await.unwrap());
}

#[tokio::test]
async fn a_host_that_forwarded_nothing_forwards_nothing_for_others() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    // Another machine behind the host, of which the host's owner wants nothing to pass.
    let other = Place::new("other");
    world.host.ip(&format!(
        "link add in0 type veth peer name eth0 netns {}",
        other.name()
    ));
    world.host.ip("addr add 203.0.113.1/24 dev in0");
    world.host.ip("link set in0 up");
    other.ip("addr add 203.0.113.2/24 dev eth0");
    other.ip("link set eth0 up");
    other.ip("route add default via 203.0.113.1");
    other.serve(80);
    world
        .outside
        .ip(&format!("route add 203.0.113.0/24 via {UPLINK}"));
    let a = world.guest(0, 10, |_| {}).await;
    assert_eq!(
        a.place.tcp("203.0.113.2", 80).as_deref(),
        Some("203.0.113.1"),
        "NAT leads everywhere"
    );
    assert_eq!(world.outside.tcp("203.0.113.2", 80), None);
    // Now he wants it.
    world.host.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    world.firewall.refresh().await.unwrap();
    assert_eq!(world.outside.tcp("203.0.113.2", 80).as_deref(), Some(OUTSIDE));
    world.firewall.remove(a.vm.tap.clone()).await.unwrap();
    assert_eq!(
        world.host.switch("ipv4/conf/up0/forwarding"),
        "1",
        "that is his now"
    );
}

#[tokio::test]
async fn a_new_uplink_is_followed() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    let mut changes = Changes::listen(&world.host.namespace).unwrap();
    let a = world.guest(0, 10, |_| {}).await;
    world.host.ip(&format!(
        "link add up1 type veth peer name eth1 netns {}",
        world.outside.name()
    ));
    world.outside.ip("addr add 192.0.2.2/24 dev eth1");
    world.outside.ip("addr add 192.0.2.99/32 dev lo");
    world.outside.ip("link set eth1 up");
    world.outside.serve(80);
    world.host.ip("link set up0 down");
    world.host.ip("addr add 192.0.2.1/24 dev up1");
    world.host.ip("link set up1 up");
    world.host.ip("route add default via 192.0.2.2");
    loop {
        assert!(changes.next().await);
        world.firewall.refresh().await.unwrap();
        if world.host.switch("ipv4/conf/up1/forwarding") == "1" {
            break;
        }
    }
    assert_eq!(a.place.tcp("192.0.2.99", 80).as_deref(), Some("192.0.2.1"));
    assert_eq!(world.host.switch("ipv4/conf/up0/forwarding"), "0");
}

#[tokio::test]
async fn what_would_stop_vms_is_found() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    let facts = world.firewall.look().await.unwrap();
    assert!(facts.usable.is_ok(), "{facts:?}");
    assert_eq!(facts.obstacles, []);
    assert!(!world.rules().contains("offshoot_"), "it only looks");
    world.host.run(&[
        "nft",
        "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; add chain ip filter DOCKER-USER",
    ]);
    let facts = world.firewall.look().await.unwrap();
    assert_eq!(facts.obstacles.len(), 1, "{facts:?}");
    assert!(facts.obstacles[0].docker);
    let a = world.guest(0, 10, |_| {}).await;
    world.outside.serve(80);
    assert_eq!(a.place.tcp(OUTSIDE, 80), None, "it does stop them");
    for direction in ["iifname", "oifname"] {
        world.host.run(&[
            "nft",
            &format!("add rule ip filter FORWARD {direction} \"ofs-*\" accept"),
        ]);
    }
    assert_eq!(world.firewall.look().await.unwrap().obstacles, []);
    assert!(a.place.tcp(OUTSIDE, 80).is_some());
}

#[tokio::test]
async fn two_daemons_on_one_host_leave_each_other_alone() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    world.outside.serve(80);
    let second = Firewall::new(world.host.namespace.clone(), TableName::new([0xab, 0, 0, 2]));
    let ours = world.guest(0, 10, |_| {}).await;
    let port = publish(None, 8080, 80, Transport::Tcp);
    let theirs = world
        .guest_of(&second, 1, 11, |vm| vm.attachment.publish = vec![port])
        .await;
    for guest in [&ours, &theirs] {
        guest.place.serve(80);
        assert_eq!(guest.place.tcp(OUTSIDE, 80).as_deref(), Some(UPLINK));
    }
    assert_eq!(ours.place.tcp(&theirs.ipv4(), 80), None);
    assert_eq!(theirs.place.tcp(&ours.ipv4(), 80), None);
    assert_eq!(world.outside.tcp(UPLINK, 8080).as_deref(), Some(OUTSIDE));
    assert!(ours.place.tcp(UPLINK, 8080).is_some());
    world.firewall.remove(ours.vm.tap.clone()).await.unwrap();
    // What the first one turned on, the second one needs.
    assert_eq!(theirs.place.tcp(OUTSIDE, 80).as_deref(), Some(UPLINK));
    assert_eq!(world.outside.tcp(UPLINK, 8080).as_deref(), Some(OUTSIDE));
    second.remove(theirs.vm.tap.clone()).await.unwrap();
    assert_eq!(world.host.switch("ipv4/conf/up0/forwarding"), "0");
    assert!(!world.rules().contains("offshoot_"));
}
