//! Bytes that are no questions do no harm.

use std::net::UdpSocket;
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;

use crate::clients::question;
use crate::world::{GATEWAY, World, possible};

const PACKETS: usize = 10_000;
/// What the process may have more afterwards: caches of the allocator, never what 10,000 packets could leave (20 MiB at
/// 2 KiB each).
const MAY_GROW_KIB: u64 = 16 << 10;

/// xorshift64*: the same packets in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sends each of the packets and reads what comes back; gives how many answers there were and how many were no FORMERR.
fn throw(socket: &UdpSocket, packets: impl Iterator<Item = Vec<u8>>) -> (usize, usize) {
    let (mut answers, mut others) = (0, 0);
    let mut buffer = [0; 65_536];
    let mut read = |socket: &UdpSocket| {
        while let Ok(length) = socket.recv(&mut buffer) {
            answers += 1;
            assert!(length >= 12 && buffer[2] & 0x80 != 0, "only answers come back");
            others += usize::from(buffer[3] & 0x0f != 1);
        }
    };
    for (n, packet) in packets.enumerate() {
        // The buffer of the socket may be full for a moment.
        while socket.send(&packet).is_err() {
            std::thread::yield_now();
        }
        if n % 16 == 0 {
            read(socket);
        }
    }
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    read(socket);
    (answers, others)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_packets_of_noise_do_no_harm() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    let socket = || {
        let socket = world.guest.namespace().run(|| UdpSocket::bind("10.87.0.2:0"));
        let socket = socket.unwrap().unwrap();
        socket.connect((GATEWAY, 53)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let mut numbers = Numbers(0x5eed_0f0d_15c0_ffee);
    // Once for what is made when it is first needed.
    throw(&socket(), std::iter::once(vec![0; 100]));
    let before = resident_kib();

    let noise = (0..PACKETS).map(|_| {
        let length = numbers.below(1400);
        (0..length).map(|_| numbers.byte()).collect()
    });
    let (answers, _) = throw(&socket(), noise);
    assert!(answers <= PACKETS);

    let valid = [
        question("web.vm.internal", RecordType::A),
        question("2.0.87.10.in-addr.arpa", RecordType::PTR),
        question("www.example.org", RecordType::AAAA),
    ];
    let mut numbers = Numbers(0x0dd_ba11);
    let mutated = (0..PACKETS).map(|n| {
        let mut packet = valid[n % valid.len()].clone();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(packet.len());
            packet[at] = numbers.byte();
        }
        match numbers.below(4) {
            0 => packet.truncate(numbers.below(packet.len())),
            1 => packet.extend((0..numbers.below(64)).map(|n| n as u8)),
            _ => {}
        }
        packet
    });
    let (answers, others) = throw(&socket(), mutated);
    assert!(answers <= PACKETS && others > 0);

    let grown = resident_kib().saturating_sub(before);
    assert!(grown < MAY_GROW_KIB, "{grown} KiB more than before");
    assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
    assert_eq!(world.dig("+short +tcp -x 10.87.0.3").await, "db.vm.internal.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_is_too_long_is_refused() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    let socket = world.guest.namespace().run(|| UdpSocket::bind("10.87.0.2:0"));
    let socket = socket.unwrap().unwrap();
    socket.connect((GATEWAY, 53)).unwrap();
    let mut long = question("web.vm.internal", RecordType::A);
    long.resize(5000, 0);
    socket.send(&long).unwrap();
    let mut buffer = [0; 512];
    let length = tokio::task::spawn_blocking(move || socket.recv(&mut buffer).map(|length| (length, buffer)))
        .await
        .unwrap();
    let (length, buffer) = length.unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(u16::from(answer.response_code), 1, "FORMERR");
}
