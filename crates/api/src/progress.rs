//! The lines that long work answers with.

use offshoot_model::ProgressEvent;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;

/// Media type of a stream of [`Line`]s.
pub const NDJSON: &str = "application/x-ndjson";

/// One line of the answer to long work. `Done` or `Failed` comes once and last; an answer that ends without
/// either was cut off, and the work was cancelled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Line<T> {
    /// How far it is.
    Progress {
        /// The step.
        progress: ProgressEvent,
    },
    /// It is done.
    Done {
        /// What came of it.
        result: T,
    },
    /// It failed and left nothing.
    Failed {
        /// Why.
        error: ApiError,
    },
}
