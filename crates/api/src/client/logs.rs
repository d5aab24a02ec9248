//! The logs of a VM as the client reads them.

use bytes::{Bytes, BytesMut};

use super::connection::AnswerBody;
use super::error::{ClientError, ProtocolError};
use crate::log_frame::{self, LogStream};

/// A stream of log frames.
#[derive(Debug)]
pub struct Logs {
    body: AnswerBody,
    buffer: BytesMut,
}

impl Logs {
    pub(super) fn new(body: AnswerBody) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
        }
    }

    /// The next piece of output; `None` at the end. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<(LogStream, Bytes)>, ClientError> {
        loop {
            let frame =
                log_frame::decode(&mut self.buffer).map_err(|e| self.body.broken(ProtocolError::Frame(e)))?;
            if frame.is_some() {
                return Ok(frame);
            }
            match self.body.chunk().await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(self.body.broken(ProtocolError::CutOff)),
            }
        }
    }
}
