//! Whole conversations over a stream that remembers the ones before.

use offshoot_agent_proto::link::{GuestLink, HostLink};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(std::time::Duration::from_secs(60), test)
            .await
            .expect("stuck")
    })
}

/// Answers every conversation with what it says, until the port closes.
async fn echo(port: DuplexStream) {
    let mut link = GuestLink::new(port);
    while link.accept().await.is_ok() {
        let mut buffer = vec![0; 10_000];
        while let Ok(count @ 1..) = link.read(&mut buffer).await {
            if link.write_all(&buffer[..count]).await.is_err() || link.flush().await.is_err() {
                break;
            }
        }
    }
}

async fn talk(link: HostLink<DuplexStream>, message: &[u8]) -> DuplexStream {
    let (mut read, mut write) = tokio::io::split(link);
    let send = async {
        write.write_all(message).await.unwrap();
        write.flush().await.unwrap();
    };
    let mut back = vec![0; message.len()];
    let receive = async { read.read_exact(&mut back).await.unwrap() };
    tokio::join!(send, receive);
    assert!(back == message, "{} bytes came back different", message.len());
    read.unsplit(write).into_inner()
}

#[test]
fn large_messages_pass_both_ways_through_a_narrow_port() {
    run(async {
        let (host, guest) = duplex(5000);
        let echo = tokio::spawn(echo(guest));
        let link = HostLink::connect(host).await.unwrap();
        let message: Vec<u8> = (0..3_000_000_u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        drop(talk(link, &message).await);
        echo.await.unwrap();
    });
}

#[test]
fn the_host_hears_that_the_guest_hung_up() {
    run(async {
        let (host, guest) = duplex(5000);
        let guest = tokio::spawn(async move {
            let mut link = GuestLink::new(guest);
            link.accept().await.unwrap();
            link.write_all(b"bye").await.unwrap();
            link.shutdown().await.unwrap();
            link.accept().await.unwrap_err()
        });
        let mut link = HostLink::connect(host).await.unwrap();
        let mut all = Vec::new();
        link.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"bye");
        drop(link);
        assert_eq!(guest.await.unwrap().kind(), std::io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_new_conversation_ends_the_old_one_in_the_guest() {
    run(async {
        let (host, guest) = duplex(5000);
        let guest = tokio::spawn(async move {
            let mut link = GuestLink::new(guest);
            link.accept().await.unwrap();
            let error = link.read_to_end(&mut Vec::new()).await.unwrap_err();
            link.accept().await.unwrap();
            link.write_all(b"x").await.unwrap();
            link.flush().await.unwrap();
            (error.kind(), link)
        });
        let first = HostLink::connect(host).await.unwrap();
        let mut second = HostLink::connect(first.into_inner()).await.unwrap();
        assert_eq!(second.read_u8().await.unwrap(), b'x');
        assert_eq!(guest.await.unwrap().0, std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn damage_ends_the_conversation_on_both_sides() {
    run(async {
        let (host, guest) = duplex(100_000);
        let echo = tokio::spawn(echo(guest));
        let mut link = HostLink::connect(host).await.unwrap();
        link.write_all(b"a").await.unwrap();
        link.flush().await.unwrap();
        assert_eq!(link.read_u8().await.unwrap(), b'a');
        let mut port = link.into_inner();
        port.write_all(&[0, 9, 9, 9, 0]).await.unwrap();
        // The guest says BYE and goes on to serve the next.
        let link = HostLink::connect(port).await.unwrap();
        drop(talk(link, b"again").await);
        echo.await.unwrap();
    });
}

/// What a host that dies at any moment leaves in the queue: the start of a real conversation.
async fn recorded(messages: &[Vec<u8>]) -> Vec<u8> {
    let (host, mut tap) = duplex(1 << 20);
    let (relay, guest) = duplex(1 << 20);
    let echo = tokio::spawn(echo(guest));
    let relay = tokio::spawn(async move {
        let (mut from_guest, mut to_guest) = tokio::io::split(relay);
        let (mut from_host, mut to_host) = tokio::io::split(&mut tap);
        let mut record = Vec::new();
        let up = async {
            let mut buffer = vec![0; 4096];
            while let Ok(count @ 1..) = from_host.read(&mut buffer).await {
                record.extend_from_slice(&buffer[..count]);
                to_guest.write_all(&buffer[..count]).await.unwrap();
            }
            to_guest.shutdown().await.unwrap();
        };
        let down = async {
            let _ = tokio::io::copy(&mut from_guest, &mut to_host).await;
        };
        tokio::join!(up, down);
        record
    });
    let mut link = HostLink::connect(host).await.unwrap();
    for message in messages {
        let mut port = talk(link, message).await;
        port.write_all(&[]).await.unwrap();
        link = HostLink::connect(port).await.unwrap();
    }
    drop(link);
    let record = relay.await.unwrap();
    echo.await.unwrap();
    record
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn after_an_old_conversation_cut_anywhere_a_new_one_works(
        messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 0..3),
        cut in any::<prop::sample::Index>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        width in 100_usize..10_000,
    ) {
        run(async {
            let record = recorded(&messages).await;
            let (mut host, guest) = duplex(width);
            let echo = tokio::spawn(echo(guest));
            let (mut read, mut write) = tokio::io::split(&mut host);
            let left = [&record[..cut.index(record.len() + 1)], &noise].concat();
            // The guest's answers to the old host are partly read, as by a host that then dies.
            let mut unread = vec![0; left.len() / 2];
            tokio::select! {
                result = write.write_all(&left) => result.unwrap(),
                () = async { loop { let _ = read.read(&mut unread).await; } } => {}
            }
            let _ = (read, write);
            let link = HostLink::connect(host).await.unwrap();
            drop(talk(link, b"the new conversation").await);
            echo.await.unwrap();
        });
    }

    #[test]
    fn a_hostile_guest_cannot_hurt_the_host(noise in proptest::collection::vec(any::<u8>(), 0..4000)) {
        run(async {
            let (host, mut guest) = duplex(1 << 16);
            guest.write_all(&noise).await.unwrap();
            guest.shutdown().await.unwrap();
            assert!(HostLink::connect(host).await.is_err());
        });
    }
}
