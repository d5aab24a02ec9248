//! Who may ask, and how often at once.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::{GATEWAY, World, dig, possible};

/// A question as a stub resolver sends it.
pub(crate) fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), kind));
    message.to_vec().unwrap()
}

async fn connect(world: &World) -> TcpStream {
    let to: SocketAddr = format!("{GATEWAY}:53").parse().unwrap();
    let stream = world.guest.namespace().run(|| std::net::TcpStream::connect(to));
    let stream = stream.unwrap().unwrap();
    stream.set_nonblocking(true).unwrap();
    TcpStream::from_std(stream).unwrap()
}

/// Asks on a connection; nothing if it is closed.
async fn ask(stream: &mut TcpStream) -> Option<Message> {
    let question = question("web.vm.internal", RecordType::A);
    stream.write_u16(question.len().try_into().unwrap()).await.ok()?;
    stream.write_all(&question).await.ok()?;
    let length = stream.read_u16().await.ok()?;
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(Message::from_vec(&bytes).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_met_with_silence() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    assert_eq!(
        world.dig("+short -b 10.87.0.2 web.vm.internal").await,
        "10.87.0.2\n"
    );
    let stranger = world.dig("+time=1 -b 10.99.0.2 web.vm.internal").await;
    assert!(stranger.contains("no servers could be reached"), "{stranger}");
    let stranger = world.dig("+time=1 +tcp -b 10.99.0.2 web.vm.internal").await;
    assert!(!stranger.contains("status:"), "{stranger}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_a_few_connections_and_others_have_theirs() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    let mut held = Vec::new();
    for _ in 0..50 {
        held.push(connect(&world).await);
    }
    let mut served = 0;
    for stream in &mut held {
        if let Some(answer) = ask(stream).await {
            assert_eq!(answer.answers.len(), 1);
            served += 1;
        }
    }
    assert_eq!(served, 8, "so many connections of one client are served");
    // Those that are served are served again, and the host has connections of its own.
    assert!(ask(&mut held[0]).await.is_some());
    assert_eq!(
        dig(&world.host, "+tcp +short web.vm.internal").await,
        "10.87.0.2\n"
    );
    drop(held);
    // A place is free again once the server has seen that its client went.
    loop {
        let mut stream = connect(&world).await;
        if ask(&mut stream).await.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_promises_too_much_is_closed() {
    if !possible() {
        return;
    }
    let world = World::listening(&[]);
    let mut stream = connect(&world).await;
    stream.write_u16(u16::MAX).await.unwrap();
    let mut rest = Vec::new();
    // An end, or a reset: the server does not read what it will not take.
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.is_empty());
    // One that says nothing for ten seconds is closed as well; it waits for that here.
    let mut idle = connect(&world).await;
    assert_eq!(idle.read(&mut [0; 1]).await.unwrap(), 0);
}
