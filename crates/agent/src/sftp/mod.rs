//! The file server of SSH connections: sftp version 3 with OpenSSH's extensions (its `PROTOCOL` file), on standard input
//! and output.
//!
//! It is a process of its own, this program executed again, because that is how it gets its user's rights, dies with a
//! signal, and hangs in a slow file system alone. It has one thread and needs no runtime: requests are answered in the
//! order in which they come, as many at a time as have come, so pipelined clients are fast.
//!
//! Not here: the protocol's bytes (crate russh-sftp), and who may use it (`crate::ssh`).

mod extended;
mod names;
mod server;

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes, BytesMut};
use russh_sftp::protocol::{Packet, StatusCode};

use self::server::Server;

/// The largest request: a write of [`server::MAX_DATA`] and what surrounds it (OpenSSH's own limit).
const MAX_PACKET: usize = 256 << 10;

/// Answers are gathered up to this size.
const GATHERED: usize = 256 << 10;

/// How much is read at a time: what a pipe has room for.
const READ_SIZE: usize = 256 << 10;

/// Why a conversation cannot go on.
#[derive(Debug, thiserror::Error)]
enum SftpError {
    /// The client is gone.
    #[error(transparent)]
    Pipe(#[from] io::Error),
    /// A request that is no request.
    #[error("a packet of {length} bytes")]
    Packet {
        /// Its length, as it says itself.
        length: usize,
    },
    /// An answer that cannot be written down.
    #[error("an answer cannot be encoded: {0}")]
    Answer(String),
}

/// The process's whole life; returns its status.
pub(crate) fn run() -> i32 {
    match converse(&mut io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

/// Answers requests until there are no more.
fn converse(input: &mut impl Read, output: &mut impl Write) -> Result<(), SftpError> {
    let mut server = Server::default();
    let mut received = BytesMut::new();
    let mut answers = Vec::new();
    let mut buffer = vec![0; READ_SIZE];
    loop {
        while let Some(request) = take_packet(&mut received)? {
            let answer = answer(&mut server, request);
            answers.extend_from_slice(
                &Bytes::try_from(answer).map_err(|error| SftpError::Answer(error.to_string()))?,
            );
            if answers.len() >= GATHERED {
                output.write_all(&answers)?;
                answers.clear();
            }
        }
        output.write_all(&answers)?;
        output.flush()?;
        answers.clear();
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => received.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The next whole packet of what was received, without its length.
fn take_packet(received: &mut BytesMut) -> Result<Option<Bytes>, SftpError> {
    let Some(length) = received.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*length) as usize;
    if length == 0 || length > MAX_PACKET {
        return Err(SftpError::Packet { length });
    }
    if received.len() < 4 + length {
        return Ok(None);
    }
    received.advance(4);
    Ok(Some(received.split_to(length).freeze()))
}

/// The answer to one packet, whatever it holds.
fn answer(server: &mut Server, mut request: Bytes) -> Packet {
    // What cannot be read has its number at the same place as everything else.
    let id = request.get(1..5).and_then(|id| id.first_chunk()).copied();
    match Packet::try_from(&mut request) {
        Ok(packet) => server.answer(packet),
        Err(_) => Packet::error(u32::from_be_bytes(id.unwrap_or_default()), StatusCode::BadMessage),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use russh_sftp::protocol::{Init, RealPath};

    use super::*;

    fn talk(requests: Vec<Packet>) -> Vec<Packet> {
        let bytes: Vec<u8> = requests
            .into_iter()
            .flat_map(|packet| Bytes::try_from(packet).unwrap())
            .collect();
        let mut output = Vec::new();
        converse(&mut &bytes[..], &mut output).unwrap();
        let mut output = BytesMut::from(&output[..]);
        std::iter::from_fn(|| take_packet(&mut output).unwrap())
            .map(|mut packet| Packet::try_from(&mut packet).unwrap())
            .collect()
    }

    #[test]
    fn requests_are_answered_in_order() {
        let init = Init {
            version: 3,
            extensions: Default::default(),
        };
        let path = |id, path: &str| {
            Packet::from(RealPath {
                id,
                path: path.to_owned(),
            })
        };
        let answers = talk(vec![init.into(), path(7, "/usr/../etc"), path(8, "/")]);
        let [
            Packet::Version(version),
            Packet::Name(first),
            Packet::Name(second),
        ] = &answers[..]
        else {
            panic!("{answers:?}")
        };
        assert!(version.extensions.contains_key("limits@openssh.com"));
        assert_eq!((first.id, &*first.files[0].filename), (7, "/etc"));
        assert_eq!((second.id, &*second.files[0].filename), (8, "/"));
    }

    #[test]
    fn what_is_no_request_is_told_so_by_its_number() {
        let mut output = Vec::new();
        let request = [0, 0, 0, 6, 3, 0, 0, 1, 2, 9];
        converse(&mut &request[..], &mut output).unwrap();
        assert_eq!(&output[4..13], [101, 0, 0, 1, 2, 0, 0, 0, 5]);
        let long = [0xff; 8];
        assert!(matches!(
            converse(&mut &long[..], &mut output),
            Err(SftpError::Packet { .. })
        ));
    }

    proptest! {
        /// Types above 20 change nothing, so random bytes can be sent to the real thing.
        #[test]
        fn random_bytes_do_no_harm(kind in 21_u8.., body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut request = Bytes::from([&[kind][..], &body].concat());
            let mut server = Server::default();
            let answer = answer(&mut server, request.clone());
            prop_assert!(Bytes::try_from(answer).is_ok());
            let whole = [&(request.len() as u32).to_be_bytes()[..], &request.copy_to_bytes(request.len())].concat();
            prop_assert!(converse(&mut &whole[..], &mut Vec::new()).is_ok());
        }
    }
}
