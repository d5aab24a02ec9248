//! What images are called: `debian`, `ghcr.io/owner/tool:1.2`, `localhost:5000/x@sha256:…`.
//!
//! Names are completed as Docker completes them: no registry means `docker.io`, no owner there means `library`, neither tag
//! nor digest means `latest`. Whether an image of that name exists is not known here.

use std::fmt;
use std::str::FromStr;

use offshoot_model::{Digest, DigestError, ErrorKind, Explain};
use serde::{Deserialize, Serialize};

/// The longest text that is looked at: a registry of 255, a name of 255, a tag of 128 and a digest have room in it.
const MAX_LENGTH: usize = 1024;

/// A complete, valid reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    inner: oci_spec::distribution::Reference,
    digest: Option<Digest>,
}

/// Why a text is not a reference.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It has the wrong form.
    #[error("`{text}` is not an image reference")]
    Form {
        /// The refused text, shortened.
        text: String,
        /// What is wrong with it.
        #[source]
        source: oci_spec::distribution::ParseError,
    },
    /// Its digest is not one that we can check.
    #[error("`{text}` is not an image reference")]
    Digest {
        /// The refused text, shortened.
        text: String,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// 64 hex digits are an image's id and never its name.
    #[error("`{text}` is not an image reference: a name of 64 hex digits would look like an image id")]
    LooksLikeId {
        /// The refused text, shortened.
        text: String,
    },
}

impl Explain for ReferenceError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        let (Self::Form { text, .. } | Self::Digest { text, .. } | Self::LooksLikeId { text }) = self;
        let name = text.split(['@', ':']).next().unwrap_or_default();
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            return vec![format!("image names are lower-case: `{}`", text.to_lowercase())];
        }
        vec![
            "write [REGISTRY/]NAME[:TAG][@DIGEST], such as debian:bookworm or localhost:5000/tool:1.2".into(),
        ]
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

impl ImageReference {
    /// The registry: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        self.inner.registry()
    }

    /// The name within the registry: `library/debian`.
    pub fn repository(&self) -> &str {
        self.inner.repository()
    }

    /// The tag; there is one wherever there is no digest.
    pub fn tag(&self) -> Option<&str> {
        self.inner.tag()
    }

    /// The digest of the manifest or index, where it is pinned.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The name without tag and digest, as people write it: `debian`, `ghcr.io/owner/tool`.
    pub fn short_name(&self) -> String {
        let (registry, repository) = (self.registry(), self.repository());
        if registry != "docker.io" {
            return format!("{registry}/{repository}");
        }
        match repository.strip_prefix("library/") {
            // `library/a/b` without its prefix would be another image.
            Some(name) if !name.contains('/') => name.to_owned(),
            _ => repository.to_owned(),
        }
    }

    /// The whole as people write it: `debian:bookworm`. Parsing it gives the same reference again.
    pub fn short(&self) -> String {
        let mut text = self.short_name();
        if let Some(tag) = self.tag() {
            text = format!("{text}:{tag}");
        }
        match self.digest {
            Some(digest) => format!("{text}@{digest}"),
            None => text,
        }
    }

    /// Whether the registry is this machine, where plain HTTP is what registries speak.
    pub fn is_loopback(&self) -> bool {
        let host = self
            .registry()
            .rsplit_once(':')
            .map_or(self.registry(), |(host, _)| host);
        host == "localhost"
            || host.ends_with(".localhost")
            || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    pub(crate) fn as_oci(&self) -> &oci_spec::distribution::Reference {
        &self.inner
    }
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        use oci_spec::distribution::{ParseError, Reference};
        let form = |source| ReferenceError::Form {
            text: shorten(text),
            source,
        };
        if text.len() > MAX_LENGTH {
            return Err(form(ParseError::NameTooLong));
        }
        let inner = Reference::try_from(text).map_err(form)?;
        let digest = inner
            .digest()
            .map(str::parse::<Digest>)
            .transpose()
            .map_err(|source| ReferenceError::Digest {
                text: shorten(text),
                source,
            })?;
        let name = text.split(['@', ':']).next().unwrap_or_default();
        if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ReferenceError::LooksLikeId { text: shorten(text) });
        }
        Ok(Self { inner, digest })
    }
}

impl TryFrom<String> for ImageReference {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl From<ImageReference> for String {
    fn from(reference: ImageReference) -> String {
        reference.to_string()
    }
}

/// The complete form, which is what is stored and compared: `docker.io/library/debian:latest`.
impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_completed_as_docker_does_it() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let check = |text: &str, full: &str, short: &str| {
            let reference: ImageReference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(reference.short(), short, "{text}");
        };
        check("debian", "docker.io/library/debian:latest", "debian:latest");
        check(
            "debian:bookworm",
            "docker.io/library/debian:bookworm",
            "debian:bookworm",
        );
        check(
            "docker.io/debian",
            "docker.io/library/debian:latest",
            "debian:latest",
        );
        check(
            "index.docker.io/library/debian",
            "docker.io/library/debian:latest",
            "debian:latest",
        );
        check("owner/tool:1", "docker.io/owner/tool:1", "owner/tool:1");
        check(
            "docker.io/library/a/b",
            "docker.io/library/a/b:latest",
            "library/a/b:latest",
        );
        check("localhost/x", "localhost/x:latest", "localhost/x:latest");
        check(
            "localhost:5000/x",
            "localhost:5000/x:latest",
            "localhost:5000/x:latest",
        );
        check(
            "127.0.0.1:5000/a/b:c",
            "127.0.0.1:5000/a/b:c",
            "127.0.0.1:5000/a/b:c",
        );
        check("ghcr.io/o/t", "ghcr.io/o/t:latest", "ghcr.io/o/t:latest");
        check(
            &format!("debian@{digest}"),
            &format!("docker.io/library/debian@{digest}"),
            &format!("debian@{digest}"),
        );
        check(
            &format!("debian:x@{digest}"),
            &format!("docker.io/library/debian:x@{digest}"),
            &format!("debian:x@{digest}"),
        );
    }

    #[test]
    fn what_is_no_reference_is_refused_with_a_hint() {
        let id = "ab".repeat(32);
        for bad in [
            "",
            ":",
            "@",
            "Debian",
            "a b",
            "../x",
            "/x",
            "x/",
            "-x",
            "x:",
            "x:a/b",
            "x@sha256:ab",
            "a\nb",
            "http://x/y",
            &format!("x@sha512:{}", "ab".repeat(64)),
            &format!("x@sha256:{}", "AB".repeat(32)),
            &id,
            &format!("{id}:tag"),
            &"a".repeat(300),
            &"a/".repeat(3000),
        ] {
            let error = bad
                .parse::<ImageReference>()
                .err()
                .unwrap_or_else(|| panic!("{bad:?}"));
            assert!(
                !error.hints().is_empty() && !error.to_string().contains('\n'),
                "{error}"
            );
        }
        let hints = "Debian:Bookworm".parse::<ImageReference>().unwrap_err().hints();
        assert_eq!(hints, ["image names are lower-case: `debian:bookworm`"]);
    }

    #[test]
    fn loopback_registries_are_known() {
        for (text, expected) in [
            ("localhost:5000/x", true),
            ("localhost/x", true),
            ("reg.localhost/x", true),
            ("127.0.0.1:5000/x", true),
            ("127.9.9.9/x", true),
            ("debian", false),
            ("127.0.0.1.example.com/x", false),
            ("10.0.0.1:5000/x", false),
        ] {
            assert_eq!(
                text.parse::<ImageReference>().unwrap().is_loopback(),
                expected,
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_form_of_a_reference_means_the_same(
            text in "([a-z0-9]{1,8}(\\.[a-z]{2,3}|:[0-9]{2,4})/)?([a-z0-9]{1,6}/){0,2}[a-z0-9]{1,9}(:[A-Za-z0-9_][A-Za-z0-9._-]{0,9})?(@sha256:[0-9a-f]{64})?"
        ) {
            let reference: ImageReference = text.parse().unwrap();
            prop_assert_eq!(&reference.to_string().parse::<ImageReference>().unwrap(), &reference);
            prop_assert_eq!(&reference.short().parse::<ImageReference>().unwrap(), &reference);
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}") {
            let _ = text.parse::<ImageReference>();
        }
    }
}
