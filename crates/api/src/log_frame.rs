//! The frames of `logs`: Docker's raw stream format (Engine API, "Attach to a container", "Stream format").
//!
//! ```text
//! [stream u8: 1 stdout, 2 stderr][0 0 0][length u32, big-endian][data]
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Media type of a stream of frames.
pub const MEDIA_TYPE: &str = "application/vnd.docker.multiplexed-stream";
/// Bytes before the data.
pub const HEADER: usize = 8;
/// The most data one frame carries; a longer one is a broken stream.
pub const MAX_DATA: usize = 1 << 20;

/// Which of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The stream of frames is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("broken log stream: stream {stream}, length {length}")]
pub struct FrameError {
    /// The stream byte.
    pub stream: u8,
    /// The length field.
    pub length: u32,
}

/// Writes one frame.
pub fn encode(stream: LogStream, data: &[u8], into: &mut BytesMut) {
    into.put_u8(match stream {
        LogStream::Stdout => 1,
        LogStream::Stderr => 2,
    });
    into.put_bytes(0, 3);
    into.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
    into.put_slice(data);
}

/// Takes one whole frame off the front of `from`; `None` when more bytes are needed.
pub fn decode(from: &mut BytesMut) -> Result<Option<(LogStream, Bytes)>, FrameError> {
    if from.len() < HEADER {
        return Ok(None);
    }
    let length = u32::from_be_bytes([from[4], from[5], from[6], from[7]]);
    let stream = match from[0] {
        1 if length as usize <= MAX_DATA => LogStream::Stdout,
        2 if length as usize <= MAX_DATA => LogStream::Stderr,
        stream => return Err(FrameError { stream, length }),
    };
    if from.len() < HEADER + length as usize {
        return Ok(None);
    }
    from.advance(HEADER);
    Ok(Some((stream, from.split_to(length as usize).freeze())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut() {
        let mut whole = BytesMut::new();
        encode(LogStream::Stdout, b"hello", &mut whole);
        encode(LogStream::Stderr, b"", &mut whole);
        for cut in 0..whole.len() {
            let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
            for part in [&whole[..cut], &whole[cut..]] {
                buffer.extend_from_slice(part);
                while let Some(frame) = decode(&mut buffer).unwrap() {
                    seen.push(frame);
                }
            }
            assert_eq!(
                seen,
                [
                    (LogStream::Stdout, Bytes::from("hello")),
                    (LogStream::Stderr, Bytes::new())
                ]
            );
        }
        assert!(decode(&mut BytesMut::from(&[9u8, 0, 0, 0, 0, 0, 0, 0][..])).is_err());
        assert!(decode(&mut BytesMut::from(&[1u8, 0, 0, 0, 255, 0, 0, 0][..])).is_err());
    }
}
