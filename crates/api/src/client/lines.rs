//! Answers of one JSON value a line, as the client reads them.

use std::marker::PhantomData;

use bytes::BytesMut;
use offshoot_model::Event;
use serde::de::DeserializeOwned;

use super::connection::AnswerBody;
use super::error::{ClientError, ProtocolError};

/// The longest line: the result of an import that names some thousand images.
const MAX_LINE: usize = 4 << 20;

/// What happened, as it comes. Dropping it ends it.
pub type Events = Lines<Event>;

/// Values as they come, one a line. Dropping it closes the connection.
#[derive(Debug)]
pub struct Lines<T> {
    body: AnswerBody,
    buffer: BytesMut,
    /// How much of `buffer` is known to hold no end of line.
    searched: usize,
    value: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    pub(super) fn new(body: AnswerBody) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
            value: PhantomData,
        }
    }

    /// The next value; `None` when the answer ended. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            while let Some(end) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.searched + end + 1);
                self.searched = 0;
                if !line.trim_ascii().is_empty() {
                    return self.parse(&line).map(Some);
                }
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE {
                return Err(self.broken(ProtocolError::TooLong { limit: MAX_LINE }));
            }
            match self.body.chunk().await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None if self.buffer.trim_ascii().is_empty() => return Ok(None),
                None => {
                    let line = self.buffer.split();
                    self.searched = 0;
                    return self.parse(&line).map(Some);
                }
            }
        }
    }

    pub(super) fn broken(&self, source: ProtocolError) -> ClientError {
        self.body.broken(source)
    }

    fn parse(&self, line: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(line).map_err(|e| self.broken(ProtocolError::Json(e)))
    }
}
