//! Ids that we make up and names that people make up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ErrorKind, Explain};

/// How much of a refused text is shown.
const MAX_SHOWN: usize = 80;

/// A refused text as an error shows it: shortened, on one line, and with nothing that a terminal would act upon.
fn shown(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(MAX_SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id of {len} lower-case hex digits")]
pub struct IdError {
    /// The refused text, shortened, control characters escaped.
    pub text: String,
    /// How many digits such an id has.
    pub len: usize,
    /// The command that lists what has such ids.
    pub listed_by: &'static str,
}

impl Explain for IdError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        vec![format!("see `{}`", self.listed_by)]
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $listed_by:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// How many hex digits the id has.
            pub const LEN: usize = $len;

            /// Makes the id from the first digits of longer material (random bytes or a hash).
            ///
            /// # Panics
            /// If `bytes` holds fewer than `LEN / 2` bytes: the caller chose the wrong material.
            pub fn from_bytes(bytes: &[u8]) -> Self {
                Self(hex::encode(&bytes[..$len / 2]))
            }

            /// The hex digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let valid = text.len() == $len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if !valid {
                    return Err(IdError { text: shown(text), len: $len, listed_by: $listed_by });
                }
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

hex_id!(
    /// A virtual machine: 12 random hex digits, also the name of its folder under `vms/`.
    VmId, 12, "offshoot ps -a"
);
hex_id!(
    /// A template: the first 128 bits of a hash over everything that a VM must have in common with it.
    TemplateId, 32, "offshoot template ls"
);
hex_id!(
    /// A prepared base: the first 128 bits of a hash over image digest and variant.
    BaseId, 32, "offshoot df"
);
hex_id!(
    /// A kernel bundle: the first 64 bits of a hash over its files.
    KernelId, 16, "offshoot kernel ls"
);
hex_id!(
    /// One operation, from the request that asked for it to its last log line: 8 random hex digits.
    OperationId, 8, "offshoot events"
);

/// The name of a VM: one DNS label (RFC 1123), because it becomes the host name and later a DNS name.
///
/// 1 to 63 of `a-z A-Z 0-9 -`, not starting or ending with `-`. Whatever names a VM that is there (its name, its id, or the
/// first digits of its id) keeps to the same rule, so one parser stands before all of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Why a text is not a VM name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a VM name: use 1 to 63 letters, digits and hyphens, with a letter or digit first and last"
)]
pub struct NameError {
    /// The refused text, shortened, control characters escaped.
    pub text: String,
}

impl Explain for NameError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        vec!["choose a name such as `web-1`; `offshoot ps -a` shows those that are taken".into()]
    }
}

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let valid = bytes.len() <= 63
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-');
        if !valid {
            return Err(NameError { text: shown(text) });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for VmName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

/// Its id names a VM as well.
impl From<&VmId> for VmName {
    fn from(id: &VmId) -> Self {
        Self(id.as_str().to_owned())
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmName({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_dns_label() {
        for good in ["a", "web", "Web-1", "0", &"a".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "../x",
            "a.b",
            "a_b",
            "a b",
            "a\n",
            "é",
            "a/b",
            "a%2fb",
            "a\0",
            "\u{1b}[2J",
            &"a".repeat(64),
            &"a".repeat(300),
        ] {
            let error = bad.parse::<VmName>().expect_err(bad);
            let message = error.to_string();
            assert!(
                !message.contains(char::is_control) && message.len() < 1000,
                "{message:?}"
            );
            assert_eq!(error.hints().len(), 1, "{bad:?}");
        }
    }

    #[test]
    fn ids_are_fixed_length_hex() {
        assert_eq!(VmId::from_bytes(&[0xab; 16]).as_str(), "abababababab");
        for bad in [
            "",
            "abc",
            "ABABABABABAB",
            "../../../../x",
            "ababababababa",
            "-x",
            "a\u{7}",
        ] {
            let error = bad.parse::<VmId>().expect_err(bad);
            assert!(!error.to_string().contains(char::is_control), "{error}");
            assert_eq!(error.hints(), ["see `offshoot ps -a`"]);
        }
    }
}
