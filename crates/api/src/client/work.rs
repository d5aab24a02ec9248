//! Long work as the client sees it: lines of progress, then the result.

use offshoot_model::ProgressEvent;
use serde::de::DeserializeOwned;

use super::connection::AnswerBody;
use super::error::{ClientError, ProtocolError};
use super::lines::Lines;
use crate::progress::Line;

/// Long work that goes on in the daemon. Dropping it cancels the work.
#[derive(Debug)]
pub struct Work<T> {
    lines: Lines<Line<T>>,
}

impl<T: DeserializeOwned> Work<T> {
    pub(super) fn new(body: AnswerBody) -> Self {
        Self {
            lines: Lines::new(body),
        }
    }

    /// The next line; `None` when the answer ended. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<Line<T>>, ClientError> {
        self.lines.next().await
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
        Err(self.lines.broken(ProtocolError::CutOff))
    }
}
