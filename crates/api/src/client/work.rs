//! Long work as the client sees it: lines of progress, then the result.

use std::marker::PhantomData;

use bytes::BytesMut;
use offshoot_model::ProgressEvent;
use serde::de::DeserializeOwned;

use super::connection::AnswerBody;
use super::error::{ClientError, ProtocolError};
use crate::progress::Line;

/// The longest line: the result of an import that names some thousand images.
const MAX_LINE: usize = 4 << 20;

/// Long work that goes on in the daemon. Dropping it cancels the work.
#[derive(Debug)]
pub struct Work<T> {
    body: AnswerBody,
    buffer: BytesMut,
    /// How much of `buffer` is known to hold no end of line.
    searched: usize,
    result: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Work<T> {
    pub(super) fn new(body: AnswerBody) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
            result: PhantomData,
        }
    }

    /// The next line; `None` when the answer ended. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<Line<T>>, ClientError> {
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
                return Err(self.body.broken(ProtocolError::TooLong { limit: MAX_LINE }));
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

    /// Waits for the result and hands every step of progress to `on_progress`.
    pub async fn finish(mut self, mut on_progress: impl FnMut(ProgressEvent)) -> Result<T, ClientError> {
        while let Some(line) = self.next().await? {
            match line {
                Line::Progress { progress } => on_progress(progress),
                Line::Done { result } => return Ok(result),
                Line::Failed { error } => return Err(ClientError::Api(error)),
            }
        }
        Err(self.body.broken(ProtocolError::CutOff))
    }

    fn parse(&self, line: &[u8]) -> Result<Line<T>, ClientError> {
        serde_json::from_slice(line).map_err(|e| self.body.broken(ProtocolError::Json(e)))
    }
}
