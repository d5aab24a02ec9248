//! What runs is told, what does not is not.

use offshoot_model::VmId;
use offshoot_net::dns::port_holder;

use crate::world::{GATEWAY6, World, dig, possible};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_known_by_its_name_and_its_addresses() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    for (arguments, expected) in [
        ("+short web.vm.internal", "10.87.0.2\n"),
        ("+short WEB.VM.INTERNAL", "10.87.0.2\n"),
        ("+short web.vm.internal AAAA", "fd12:3456:789a::2\n"),
        ("+short -x 10.87.0.3", "db.vm.internal.\n"),
        ("+short -x fd12:3456:789a::3", "db.vm.internal.\n"),
        ("+short -x 10.87.0.1", "host.vm.internal.\n"),
        ("+short +tcp web.vm.internal", "10.87.0.2\n"),
        ("+short +noedns web.vm.internal", "10.87.0.2\n"),
        ("+short vm.internal NS", "host.vm.internal.\n"),
    ] {
        assert_eq!(world.dig(arguments).await, expected, "{arguments}");
    }
    let over_v6 = format!("@{GATEWAY6} +short db.vm.internal");
    assert_eq!(world.dig(&over_v6).await, "10.87.0.3\n");
    // The host itself.
    assert_eq!(dig(&world.host, "+short web.vm.internal").await, "10.87.0.2\n");
    let nodata = world.dig("web.vm.internal MX").await;
    assert!(
        nodata.contains("status: NOERROR") && nodata.contains("ANSWER: 0") && nodata.contains("IN\tSOA"),
        "{nodata}"
    );
    assert!(nodata.contains("flags: qr aa rd ra;"), "{nodata}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_goes_with_its_vm() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
    world.vms.remove("web");
    let gone = world.dig("web.vm.internal").await;
    assert!(
        gone.contains("status: NXDOMAIN") && gone.contains("IN\tSOA"),
        "{gone}"
    );
    let gone = world.dig("-x 10.87.0.2").await;
    assert!(gone.contains("status: NXDOMAIN"), "{gone}");
    world.vms.put("again", 2);
    assert_eq!(world.dig("+short again.vm.internal").await, "10.87.0.2\n");
    assert_eq!(world.dig("+short -x 10.87.0.2").await, "again.vm.internal.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_there_as_long_as_a_vm_needs_it() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    let other = VmId::from_bytes(&[8; 8]);
    world.servers.ensure(&world.network, &other).unwrap();
    world.servers.release(&world.user);
    assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
    assert_eq!(world.servers.listening().len(), 1);
    world.servers.release(&other);
    assert_eq!(world.servers.listening(), []);
    // The ports are free again: somebody else can have them, as soon as the tasks are gone.
    let again = || world.servers.ensure(&world.network, &other);
    while again().is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_somebody_else_has_is_named() {
    if !possible() {
        return;
    }
    use offshoot_model::Explain as _;
    let world = World::new(&[]);
    let namespace = world.host.namespace();
    port_holder(&namespace).unwrap();
    // As dnsmasq does by default.
    let everywhere = namespace
        .run(|| std::net::UdpSocket::bind("0.0.0.0:53"))
        .unwrap()
        .unwrap();
    let refused = world.servers.ensure(&world.network, &world.user).unwrap_err();
    assert!(refused.is_taken(), "{refused:?}");
    assert!(refused.hints()[0].contains("bind-interfaces"), "{refused:?}");
    assert!(port_holder(&namespace).unwrap_err().is_taken());
    drop(everywhere);
    port_holder(&namespace).unwrap();
    world.servers.ensure(&world.network, &world.user).unwrap();
    // Our own servers are in nobody's way.
    port_holder(&namespace).unwrap();
}
