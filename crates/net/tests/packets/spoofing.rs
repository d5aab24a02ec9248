//! Guests that lie: frames made by hand go in at one TAP, and what comes out of another one is looked at.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use offshoot_model::Mac;
use offshoot_net::firewall::Guarded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::frames::{arp, ethernet, icmp6, tagged, udp4, udp6};
use crate::world::{World, possible};

/// A `virtio_net_hdr` that says nothing, which stands before each frame.
const HEADER: [u8; 10] = [0; 10];
/// What is let through comes at once; a busy machine has its time.
const PATIENCE: Duration = Duration::from_secs(10);

/// A VM that is played by the test, frame by frame.
struct Puppet {
    vm: Guarded,
    tap: OwnedFd,
}

impl Puppet {
    async fn new(world: &World, number: u8) -> Self {
        let (network, vm) = world.guarded(0, number);
        let tap = world
            .host
            .namespace
            .run(|| offshoot_sys::tap::create(&vm.tap))
            .unwrap()
            .unwrap();
        world
            .host
            .ip(&format!("link set {} master {} up", vm.tap, network.bridge));
        world.firewall.insert(vec![(network, vm.clone())]).await.unwrap();
        Self { vm, tap }
    }

    fn mac(&self) -> Mac {
        self.vm.attachment.mac
    }

    fn send(&self, frame: &[u8]) {
        rustix::io::write(&self.tap, &[&HEADER, frame].concat()).unwrap();
    }

    /// The next frame that comes out.
    fn receive(&self, until: Instant) -> Vec<u8> {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap();
        let mut files = [PollFd::new(&self.tap, PollFlags::IN)];
        let ready = poll(&mut files, Some(&left)).unwrap();
        assert_ne!(ready, 0, "nothing comes");
        let mut buffer = [0; 2048];
        match rustix::io::read(&self.tap, &mut buffer).map_err(io::Error::from) {
            Ok(len) => buffer[HEADER.len()..len].to_vec(),
            Err(error) => panic!("{error}"),
        }
    }
}

/// What of `frames`, sent by `from`, comes out at `to`. Frames keep their order: when an honest one behind them is there,
/// all are there that will be.
fn pass(from: &Puppet, to: &Puppet, frames: &[Vec<u8>], marker: u8) -> Vec<bool> {
    for frame in frames {
        from.send(frame);
    }
    let last = udp4(from.mac(), from.vm.attachment.ipv4, 4000, marker);
    from.send(&last);
    let mut came = Vec::new();
    let until = Instant::now() + PATIENCE;
    loop {
        let frame = to.receive(until);
        if is(&last, &frame) {
            break;
        }
        came.push(frame);
    }
    let came = |sent: &Vec<u8>| came.iter().any(|frame| is(sent, frame));
    frames.iter().map(came).collect()
}

/// Whether a frame is the one that was sent. Bridges leave out what fills it up.
fn is(sent: &[u8], received: &[u8]) -> bool {
    received.len() > 14 && sent.starts_with(received)
}

#[tokio::test]
async fn a_vm_is_who_it_is() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    let (a, b, c) = (
        Puppet::new(&world, 10).await,
        Puppet::new(&world, 11).await,
        Puppet::new(&world, 12).await,
    );
    let (mac, of_b) = (a.mac(), b.mac());
    let (own4, own6, own_link) = (a.vm.attachment.ipv4, a.vm.attachment.ipv6, a.vm.link_local());
    let (b4, b6, b_link) = (b.vm.attachment.ipv4, b.vm.attachment.ipv6, b.vm.link_local());
    let gateway4 = world.networks[0].gateway4();
    let gateway6 = world.networks[0].gateway6();
    let nobody = Ipv6Addr::UNSPECIFIED;
    let honest = [
        udp4(mac, own4, 4001, 0),
        arp(mac, mac, own4),
        arp(mac, mac, Ipv4Addr::UNSPECIFIED),
        udp6(mac, own6, 4001),
        udp6(mac, own_link, 4001),
        icmp6(mac, own6, 136, own6),
        icmp6(mac, own6, 136, own_link),
        icmp6(mac, own_link, 135, b6),
        icmp6(mac, nobody, 135, own6),
        icmp6(mac, nobody, 143, nobody),
    ];
    assert_eq!(pass(&a, &c, &honest, 1), vec![true; honest.len()]);
    let lies = [
        ("a MAC", udp4(of_b, own4, 4001, 0)),
        (
            "a MAC in a kind of frame of its own",
            ethernet(Mac([0xff; 6]), of_b, 0x88b5, &[]),
        ),
        (
            "another kind of frame",
            ethernet(Mac([0xff; 6]), mac, 0x88b5, &[]),
        ),
        ("an IPv4 address", udp4(mac, b4, 4001, 0)),
        ("the host's", udp4(mac, gateway4, 4001, 0)),
        ("one of nobody", udp4(mac, Ipv4Addr::UNSPECIFIED, 68, 0)),
        ("ARP for another", arp(mac, mac, b4)),
        ("ARP for the host", arp(mac, mac, gateway4)),
        ("ARP to another", arp(mac, of_b, own4)),
        ("ARP as another", arp(of_b, of_b, b4)),
        ("ARP behind a tag", tagged(&arp(mac, mac, b4), 1)),
        ("priority tag", tagged(&arp(mac, mac, b4), 0)),
        ("an IPv6 address", udp6(mac, b6, 4001)),
        ("a link-local address", udp6(mac, b_link, 4001)),
        ("the host's IPv6", udp6(mac, gateway6, 4001)),
        ("no IPv6 address", udp6(mac, nobody, 4001)),
        ("an advertisement for another", icmp6(mac, own6, 136, b6)),
        ("for its link-local address", icmp6(mac, own_link, 136, b_link)),
        ("for the host", icmp6(mac, own6, 136, gateway6)),
        ("as another", icmp6(mac, b6, 136, own6)),
        ("as nobody", icmp6(mac, nobody, 136, own6)),
        ("another's address to be its own", icmp6(mac, nobody, 135, b6)),
        ("to be a router", icmp6(mac, own_link, 134, own6)),
        ("a redirect", icmp6(mac, own_link, 137, b6)),
        ("a DHCP server", udp4(mac, own4, 67, 0)),
        ("a DHCPv6 server", udp6(mac, own_link, 547)),
    ];
    let frames: Vec<_> = lies.iter().map(|(_, frame)| frame.clone()).collect();
    let passed = pass(&a, &c, &frames, 2);
    let believed: Vec<_> = lies
        .iter()
        .zip(passed)
        .filter_map(|((what, _), passed)| passed.then_some(*what))
        .collect();
    assert_eq!(believed, [""; 0]);
    // Bridges learn from frames that they keep for themselves, too.
    let lldp = Mac([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
    b.send(&udp4(of_b, b4, 4001, 3));
    a.send(&ethernet(lldp, of_b, 0x88cc, &[]));
    pass(&a, &c, &[], 4);
    pass(&b, &c, &[], 5);
    a.send(&ethernet(lldp, of_b, 0x88cc, &[]));
    pass(&a, &c, &[], 6);
    let learnt = world
        .host
        .run(&["bridge", "fdb", "show", "br", &world.networks[0].bridge]);
    let place = format!("{of_b} dev {}", b.vm.tap);
    assert!(learnt.contains(&place), "{learnt}");
    assert!(!learnt.contains(&format!("{of_b} dev {}", a.vm.tap)), "{learnt}");
}

#[tokio::test]
async fn a_vm_that_is_out_says_nothing_any_more_to_those_outside() {
    if !possible() {
        return;
    }
    let world = World::new().await;
    world.outside.serve(80);
    let a = world.guest(0, 10, |_| {}).await;
    let b = world.guest(0, 11, |_| {}).await;
    assert!(a.place.tcp(crate::world::OUTSIDE, 80).is_some());
    // It takes the other's addresses, with a real stack.
    a.place.ip("addr flush dev eth0 scope global");
    a.place.ip(&format!("addr add {}/24 dev eth0", b.ipv4()));
    a.place.ip(&format!(
        "route replace default via {} onlink dev eth0",
        world.networks[0].gateway4()
    ));
    assert_eq!(a.place.tcp(crate::world::OUTSIDE, 80), None, "its IP");
    a.place
        .ip(&format!("link set eth0 address {}", b.vm.attachment.mac));
    assert_eq!(a.place.tcp(crate::world::OUTSIDE, 80), None, "its MAC as well");
    assert!(
        b.place.tcp(crate::world::OUTSIDE, 80).is_some(),
        "who has it all the while"
    );
}
