//! Ethernet frames made by hand, as a guest that lies would make them.

use std::net::{Ipv4Addr, Ipv6Addr};

use offshoot_model::Mac;

pub(crate) const BROADCAST: Mac = Mac([0xff; 6]);
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// A frame with this type and content, filled up to the least length.
pub(crate) fn ethernet(to: Mac, from: Mac, kind: u16, content: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &kind.to_be_bytes(), content].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// The same frame in VLAN `id`.
pub(crate) fn tagged(frame: &[u8], id: u16) -> Vec<u8> {
    let tag = [0x8100_u16.to_be_bytes(), id.to_be_bytes()].concat();
    [&frame[..12], &tag, &frame[12..]].concat()
}

/// An ARP reply to everybody: `address` is at `mac`. `from` is the frame's own sender.
pub(crate) fn arp(from: Mac, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 2];
    let octets = address.octets();
    let content = [&head[..], &mac.0, &octets, &BROADCAST.0, &octets].concat();
    ethernet(BROADCAST, from, ARP, &content)
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
}

/// A UDP datagram to everybody.
pub(crate) fn udp4(from: Mac, address: Ipv4Addr, port: u16, marker: u8) -> Vec<u8> {
    let udp = [&port.to_be_bytes()[..], &[0, 9, 0, 9, 0, 0, marker]].concat();
    let mut ip = [
        &[0x45, 0, 0, 20 + udp.len() as u8, 0, 0, 0, 0, 64, 17, 0, 0][..],
        &address.octets(),
        &[255; 4],
    ]
    .concat();
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    ethernet(BROADCAST, from, IPV4, &[ip, udp].concat())
}

fn ipv6(from: Mac, address: Ipv6Addr, next: u8, content: &[u8]) -> Vec<u8> {
    let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let head = [
        &[0x60, 0, 0, 0, 0, content.len() as u8, next, 255][..],
        &address.octets(),
        &all_nodes.octets(),
    ]
    .concat();
    let to = Mac([0x33, 0x33, 0, 0, 0, 1]);
    ethernet(to, from, IPV6, &[&head, content].concat())
}

/// A UDP datagram to all nodes.
pub(crate) fn udp6(from: Mac, address: Ipv6Addr, port: u16) -> Vec<u8> {
    let udp = [&port.to_be_bytes()[..], &[0, 9, 0, 9, 0, 0, 1]].concat();
    ipv6(from, address, 17, &udp)
}

/// An ICMPv6 message about `target`: 134 is a router's advertisement, 135 a solicitation, 136 a neighbour's advertisement.
pub(crate) fn icmp6(from: Mac, address: Ipv6Addr, kind: u8, target: Ipv6Addr) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets()].concat();
    let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let pseudo = [0, 0, 0, message.len() as u8, 0, 0, 0, 58];
    let sum = checksum(&[&address.octets(), &all_nodes.octets(), &pseudo, &message]);
    message[2..4].copy_from_slice(&sum);
    ipv6(from, address, 58, &message)
}
