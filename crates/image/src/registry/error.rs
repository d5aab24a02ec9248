//! Why a pull fails.

use std::io;

use oci_client::errors::{OciDistributionError, OciErrorCode};
use offshoot_model::{ByteSize, Digest, ErrorKind, Explain};
use offshoot_store::blobs::BlobError;

use crate::index;
use crate::manifest::ManifestError;
use crate::platform::PlatformError;
use crate::reference::ReferenceError;

/// The longest text of a registry's that goes into a message of ours.
const QUOTE_LENGTH: usize = 200;

/// Why an image cannot be pulled. Layers that came whole stay, and so do the beginnings of others, for the next attempt.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name is none.
    #[error("cannot pull the image")]
    Reference {
        /// Why.
        #[from]
        source: ReferenceError,
    },
    /// The platform is none.
    #[error("cannot pull the image")]
    BadPlatform {
        /// Why.
        #[from]
        source: PlatformError,
    },
    /// This host cannot speak TLS.
    #[error("cannot make a connection to any registry")]
    Client {
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No such host, nobody listens there, or its certificate is not trusted.
    #[error("cannot reach the registry {registry}")]
    Unreachable {
        /// Its host and port.
        registry: String,
        /// Whether it was spoken to without TLS.
        plain_http: bool,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection broke.
    #[error("lost the connection to the registry {registry}")]
    Connection {
        /// Its host and port.
        registry: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// 401 or 403, or no token.
    #[error("the registry {registry} does not let us pull {repository}{}", colon(said))]
    Denied {
        /// Its host and port.
        registry: String,
        /// What we wanted.
        repository: String,
        /// What it said, shortened; may be empty.
        said: String,
    },
    /// There is no such repository, tag or digest.
    #[error("{reference} is not in its registry")]
    NotFound {
        /// The complete reference.
        reference: String,
    },
    /// Any other answer that is not what was asked for.
    #[error("the registry {registry} answered with status {status}{}", colon(said))]
    Status {
        /// Its host and port.
        registry: String,
        /// The HTTP status.
        status: u16,
        /// What it said, shortened; may be empty.
        said: String,
    },
    /// An answer that makes no sense.
    #[error("the registry {registry} gave an answer that cannot be understood")]
    Protocol {
        /// Its host and port.
        registry: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A manifest or config that we do not take.
    #[error("cannot use {reference}")]
    Manifest {
        /// The complete reference.
        reference: String,
        /// Why.
        #[source]
        source: Box<ManifestError>,
    },
    /// The manifest is not the one that was asked for.
    #[error("the registry sent another manifest than the one asked for: expected {expected}, got {actual}")]
    ManifestDigest {
        /// Asked for.
        expected: Digest,
        /// Sent.
        actual: Digest,
    },
    /// Indexes within indexes within indexes.
    #[error("{reference} lies more than {} indexes deep", index::MAX_DEPTH)]
    TooDeep {
        /// The complete reference.
        reference: String,
    },
    /// Made for other machines.
    #[error("{reference} has no image for {wanted}: it has {}", index::list(offered))]
    Platform {
        /// The complete reference.
        reference: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        offered: Vec<String>,
    },
    /// The manifest names it, the registry does not have it.
    #[error("blob {digest} is not in the registry, although its image is")]
    MissingBlob {
        /// Which.
        digest: Digest,
    },
    /// The bytes end too early, again and again.
    #[error("blob {digest} is truncated: {actual} of {expected} bytes came")]
    Truncated {
        /// Which.
        digest: Digest,
        /// By the manifest.
        expected: u64,
        /// What came.
        actual: u64,
        /// Why it ended, where that is known.
        #[source]
        source: Option<io::Error>,
    },
    /// More bytes come than the manifest says.
    #[error("blob {digest} is longer than the {expected} bytes that its manifest says")]
    TooLong {
        /// Which.
        digest: Digest,
        /// By the manifest.
        expected: u64,
    },
    /// What came is not what was promised.
    #[error("blob {expected} came damaged: its digest is {actual}")]
    Digest {
        /// Promised.
        expected: Digest,
        /// Came.
        actual: Digest,
    },
    /// The disk has no room for it.
    #[error("image needs {needed} more on disk: {available} is left")]
    NoRoom {
        /// What is still to be fetched.
        needed: ByteSize,
        /// What the file system has.
        available: ByteSize,
    },
    /// The store does not take it.
    #[error("cannot store the image")]
    Store {
        /// Why.
        #[from]
        source: BlobError,
    },
}

impl PullError {
    /// Whether trying again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Connection { .. } | Self::Truncated { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}

impl Explain for PullError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference { .. } | Self::BadPlatform { .. } => ErrorKind::InvalidRequest,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Platform { .. } => ErrorKind::NotPossible,
            Self::Manifest { source, .. } => source.kind(),
            Self::Store { source } => source.kind(),
            Self::NoRoom { .. } => ErrorKind::NoSpace,
            Self::ManifestDigest { .. }
            | Self::TooLong { .. }
            | Self::Digest { .. }
            | Self::TooDeep { .. } => ErrorKind::BadContent,
            Self::Client { .. } => ErrorKind::Internal,
            _ => ErrorKind::Upstream,
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Reference { source } => return source.hints(),
            Self::Manifest { source, .. } => return source.hints(),
            Self::Store { source } => return source.hints(),
            Self::Client { .. } => "install `ca-certificates`".into(),
            Self::Unreachable {
                registry,
                plain_http: false,
                ..
            } => format!(
                "check the name {registry}; if it speaks plain HTTP, add it to `insecure_registries` in the daemon's configuration"
            ),
            Self::Unreachable { registry, .. } => format!("check that a registry listens on {registry}"),
            Self::Denied { registry, .. } => {
                format!(
                    "check the name, or log in with `docker login {registry}`; ~/.docker/config.json is read"
                )
            }
            Self::NotFound { .. } => "check name and tag, or see what there is in `offshoot image ls`".into(),
            Self::Platform { .. } => "pull an image for this machine: VMs run on its own architecture".into(),
            Self::Truncated { .. } | Self::Connection { .. } => {
                "run `offshoot image pull` again: it goes on where it stopped".into()
            }
            Self::NoRoom { .. } => "make room with `offshoot rm` and `offshoot image rm`".into(),
            _ => return Vec::new(),
        };
        vec![hint]
    }
}

fn colon(said: &str) -> String {
    if said.is_empty() {
        String::new()
    } else {
        format!(": {said}")
    }
}

/// What a registry said, fit for a message: the first error of its envelope, or the text itself, short and on one line.
pub(super) fn quote(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Envelope {
        errors: Vec<OneError>,
    }
    #[derive(serde::Deserialize)]
    struct OneError {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Envelope>(body) {
        Ok(Envelope { errors }) => match errors.into_iter().next() {
            Some(OneError { code, message }) if message.is_empty() => code,
            Some(error) => error.message,
            None => String::new(),
        },
        // A web server's error page helps nobody.
        Err(_) if body.trim_ascii_start().starts_with(b"<") => String::new(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    text.trim()
        .chars()
        .take(QUOTE_LENGTH)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Whom we spoke to and about what, for turning the client's errors into ours.
pub(super) struct Peer<'a> {
    pub(super) registry: &'a str,
    pub(super) repository: &'a str,
    pub(super) plain_http: bool,
}

impl Peer<'_> {
    pub(super) fn denied(&self, said: String) -> PullError {
        PullError::Denied {
            registry: self.registry.into(),
            repository: self.repository.into(),
            said,
        }
    }

    pub(super) fn request(
        &self,
        is_connect: bool,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> PullError {
        let registry = self.registry.into();
        if is_connect {
            PullError::Unreachable {
                registry,
                plain_http: self.plain_http,
                source: source.into(),
            }
        } else {
            PullError::Connection {
                registry,
                source: source.into(),
            }
        }
    }

    pub(super) fn status(&self, status: u16, body: &[u8]) -> PullError {
        match status {
            401 | 403 => self.denied(quote(body)),
            _ => PullError::Status {
                registry: self.registry.into(),
                status,
                said: quote(body),
            },
        }
    }

    /// What went wrong while `digest`, or a token, was asked for.
    pub(super) fn client(&self, error: OciDistributionError, digest: Option<Digest>) -> PullError {
        use OciDistributionError as E;
        match error {
            E::RequestError(error) => self.request(error.is_connect(), error),
            E::AuthenticationFailure(said) => self.denied(quote(said.as_bytes())),
            E::UnauthorizedError { .. } => self.denied(String::new()),
            E::RegistryError { envelope, .. } => {
                let first = envelope.errors.into_iter().next();
                match (first.as_ref().map(|e| &e.code), digest) {
                    (Some(OciErrorCode::Unauthorized | OciErrorCode::Denied), _) => {
                        self.denied(first.map(|e| quote(e.message.as_bytes())).unwrap_or_default())
                    }
                    (Some(OciErrorCode::Toomanyrequests), _) => self.status(429, b""),
                    (_, Some(digest)) => PullError::MissingBlob { digest },
                    (_, None) => self.status(400, first.map(|e| e.message).unwrap_or_default().as_bytes()),
                }
            }
            E::ServerError { code, message, .. } => match digest {
                Some(digest) if code == 404 => PullError::MissingBlob { digest },
                _ => self.status(code, message.as_bytes()),
            },
            other => PullError::Protocol {
                registry: self.registry.into(),
                source: other.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_registries_say_is_quoted_short_and_on_one_line() {
        let check = |body: &str, expected: &str| assert_eq!(quote(body.as_bytes()), expected, "{body}");
        check(
            r#"{"errors":[{"code":"DENIED","message":"access\nrefused","detail":null}]}"#,
            "access refused",
        );
        check(r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED");
        check(r#"{"errors":[]}"#, "");
        check("  <html>no</html>", "");
        check("too bad\r\n", "too bad");
        check("", "");
        check(&"x".repeat(10_000), &"x".repeat(QUOTE_LENGTH));
        assert!(!quote(&[0xff, 0xfe, 27, b'[']).chars().any(char::is_control));
    }
}
