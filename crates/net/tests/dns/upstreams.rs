//! Names of others: asked once, remembered, given up in time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use offshoot_net::Namespace;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

use crate::world::{World, dig, possible};

/// A resolver of the test's own: `big` has a long answer, `none` none, anything else one address.
struct Upstream {
    by_udp: Arc<AtomicUsize>,
    by_tcp: Arc<AtomicUsize>,
}

impl Upstream {
    fn udp(&self) -> usize {
        self.by_udp.load(Ordering::SeqCst)
    }

    fn tcp(&self) -> usize {
        self.by_tcp.load(Ordering::SeqCst)
    }
}

fn answer(question: &[u8], by_udp: bool) -> Vec<u8> {
    let asked = Message::from_vec(question).expect("a question");
    let query = asked.queries[0].clone();
    let mut message = Message::response(asked.id, OpCode::Query);
    message.metadata.recursion_available = true;
    message.add_query(query.clone());
    let record = |data| Record::from_rdata(query.name().clone(), 300, data);
    let first = query
        .name()
        .iter()
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    match (first.as_slice(), query.query_type()) {
        (b"big", RecordType::TXT) if by_udp => message.metadata.truncation = true,
        (b"big", RecordType::TXT) => {
            let text = |n: usize| TXT::new(vec![format!("{n:0200}")]);
            message.add_answers((0..100).map(|n| record(RData::TXT(text(n)))));
        }
        (b"none", _) => {
            message.metadata.response_code = ResponseCode::NXDomain;
            let (at, zero) = (Name::from_ascii("example.").unwrap(), 60);
            let soa = SOA::new(at.clone(), at.clone(), 1, 1, 1, 1, zero);
            message.add_authority(Record::from_rdata(at, 60, RData::SOA(soa)));
        }
        (_, RecordType::A) => {
            message.add_answer(record(RData::from(std::net::Ipv4Addr::new(192, 0, 2, 1))));
        }
        _ => {}
    }
    message.to_vec().unwrap()
}

/// Runs one at an address of a namespace.
fn upstream(namespace: &Namespace, address: SocketAddr) -> Upstream {
    let sockets = namespace.run(|| {
        let udp = std::net::UdpSocket::bind(address).unwrap();
        let tcp = std::net::TcpListener::bind(address).unwrap();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        (udp, tcp)
    });
    let (udp, tcp) = sockets.unwrap();
    let (udp, tcp) = (
        UdpSocket::from_std(udp).unwrap(),
        TcpListener::from_std(tcp).unwrap(),
    );
    let (by_udp, by_tcp) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let count = Arc::clone(&by_udp);
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            count.fetch_add(1, Ordering::SeqCst);
            let _ = udp.send_to(&answer(&buffer[..length], true), from).await;
        }
    });
    let count = Arc::clone(&by_tcp);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                while let Ok(length) = stream.read_u16().await {
                    let mut question = vec![0; length.into()];
                    stream.read_exact(&mut question).await.unwrap();
                    count.fetch_add(1, Ordering::SeqCst);
                    let bytes = answer(&question, false);
                    stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
                    stream.write_all(&bytes).await.unwrap();
                }
            });
        }
    });
    Upstream { by_udp, by_tcp }
}

const AT: &str = "127.0.0.1:5300";

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_others_is_asked_once() {
    if !possible() {
        return;
    }
    let at = AT.parse().unwrap();
    let world = World::listening(&[at]);
    let upstream = upstream(&world.host.namespace(), at);
    for _ in 0..3 {
        assert_eq!(world.dig("+short www.example.org").await, "192.0.2.1\n");
        let none = world.dig("none.example").await;
        assert!(
            none.contains("status: NXDOMAIN") && none.contains("IN\tSOA"),
            "{none}"
        );
    }
    assert_eq!(upstream.udp(), 2, "each once, whatever the answer");
    // Not ours to say.
    let answer = world.dig("www.example.org").await;
    assert!(answer.contains("flags: qr rd ra;"), "{answer}");
    // Our own, single labels and transfers are never asked of anybody.
    for quiet in [
        "nobody.vm.internal",
        "-x 10.87.0.77",
        "printer",
        "x.onion",
        "localhost",
    ] {
        world.dig(quiet).await;
    }
    let transfer = world.dig("+tcp vm.internal AXFR").await;
    assert!(transfer.contains("Transfer failed"), "{transfer}");
    let transfer = world.dig("+tcp example.org AXFR").await;
    assert!(transfer.contains("Transfer failed"), "{transfer}");
    let unwilling = world.dig("+norecurse other.example.org").await;
    assert!(unwilling.contains("status: REFUSED"), "{unwilling}");
    assert_eq!((upstream.udp(), upstream.tcp()), (2, 0));
    // The upstream is the host's own resolver as far as we know: its question would come back to us.
    let from_host = dig(&world.host, "another.example.org").await;
    assert!(from_host.contains("status: REFUSED"), "{from_host}");
    assert_eq!(upstream.udp(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_answer_comes_by_tcp() {
    if !possible() {
        return;
    }
    let at = AT.parse().unwrap();
    let world = World::listening(&[at]);
    let upstream = upstream(&world.host.namespace(), at);
    let short = world.dig("+ignore big.example TXT").await;
    assert!(
        short.contains("flags: qr tc rd ra;") && short.contains("ANSWER: 0"),
        "{short}"
    );
    let whole = world.dig("+tcp big.example TXT").await;
    assert!(whole.contains("ANSWER: 100"), "{whole}");
    // dig itself turns to TCP.
    let whole = world.dig("big.example TXT").await;
    assert!(whole.contains("ANSWER: 100"), "{whole}");
    assert_eq!(upstream.tcp(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_is_dead_is_given_up_in_time() {
    if !possible() {
        return;
    }
    // One that takes questions and says nothing, and one that is not there.
    let (mute, gone): (SocketAddr, SocketAddr) = (AT.parse().unwrap(), "127.0.0.1:5301".parse().unwrap());
    for dead in [vec![mute], vec![gone], vec![mute, gone], vec![]] {
        let world = World::listening(&dead);
        let silent = world.host.namespace().run(|| std::net::UdpSocket::bind(mute));
        let began = Instant::now();
        let answer = world.dig("www.example.org").await;
        assert!(answer.contains("status: SERVFAIL"), "{dead:?}: {answer}");
        // dig's own patience is 15 s; the server's 4. Not a benchmark: the one has to come before the other.
        assert!(began.elapsed() < Duration::from_secs(15), "{dead:?}");
        assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
        drop(silent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_upstream_helps_out() {
    if !possible() {
        return;
    }
    let (gone, at): (SocketAddr, SocketAddr) = ("127.0.0.1:5301".parse().unwrap(), AT.parse().unwrap());
    let world = World::listening(&[gone, at]);
    let _upstream = upstream(&world.host.namespace(), at);
    assert_eq!(world.dig("+short www.example.org").await, "192.0.2.1\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_questions_at_once_are_each_answered() {
    if !possible() {
        return;
    }
    // More than may wait: those get a SERVFAIL at once, ours an answer.
    let mute: SocketAddr = AT.parse().unwrap();
    let world = World::listening(&[mute]);
    let _silent = world.host.namespace().run(|| std::net::UdpSocket::bind(mute));
    let names: String = (0..200).map(|n| format!(" n{n}.example.org")).collect();
    let flood = tokio::spawn({
        let namespace = world.guest.namespace();
        async move {
            let socket = namespace
                .run(|| std::net::UdpSocket::bind("10.87.0.2:0"))
                .unwrap()
                .unwrap();
            socket.set_nonblocking(true).unwrap();
            let socket = UdpSocket::from_std(socket).unwrap();
            for name in names.split_whitespace() {
                let question = crate::clients::question(name, RecordType::A);
                socket
                    .send_to(&question, (crate::world::GATEWAY, 53))
                    .await
                    .unwrap();
            }
            let mut refused = 0;
            let mut buffer = [0; 512];
            for _ in 0..200 {
                let length = socket.recv(&mut buffer).await.unwrap();
                let answer = Message::from_vec(&buffer[..length]).unwrap();
                assert_eq!(answer.response_code, ResponseCode::ServFail);
                refused += 1;
            }
            refused
        }
    });
    assert_eq!(world.dig("+short web.vm.internal").await, "10.87.0.2\n");
    assert_eq!(flood.await.unwrap(), 200);
}
