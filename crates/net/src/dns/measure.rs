//! What is asked, as numbers.

use std::time::Duration;

use hickory_proto::op::ResponseCode;
use metrics::{counter, histogram};

/// Counter: questions by kind and outcome.
pub const QUERIES: &str = "offshoot_dns_queries_total";
/// Histogram: how long upstreams take.
pub const FORWARD_SECONDS: &str = "offshoot_dns_forward_duration_seconds";

/// What a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A name of ours.
    Name,
    /// An address of ours.
    Address,
    /// Somebody else's, asked of an upstream.
    Forwarded,
    /// Somebody else's, still known.
    Cached,
    /// Nothing that is answered from either.
    Other,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Address => "address",
            Self::Forwarded => "forwarded",
            Self::Cached => "cached",
            Self::Other => "other",
        }
    }
}

/// A question was answered.
pub(crate) fn answered(kind: Kind, code: ResponseCode) {
    let outcome = match code {
        ResponseCode::NoError => "noerror",
        ResponseCode::NXDomain => "nxdomain",
        ResponseCode::FormErr => "formerr",
        ResponseCode::ServFail => "servfail",
        ResponseCode::NotImp => "notimp",
        ResponseCode::Refused => "refused",
        _ => "error",
    };
    count(kind, outcome);
}

/// Something was met with silence.
pub(crate) fn ignored() {
    count(Kind::Other, "ignored");
}

/// An upstream was asked.
pub(crate) fn forwarded(time: Duration) {
    histogram!(FORWARD_SECONDS).record(time);
}

fn count(kind: Kind, outcome: &'static str) {
    counter!(QUERIES, "kind" => kind.as_str(), "outcome" => outcome).increment(1);
}
