//! The domain under which VMs have names.

use std::fmt;
use std::str::FromStr;

use hickory_proto::rr::Name;
use offshoot_model::VmName;

/// The longest domain: with the longest VM's name and two dots it still is a name (RFC 1035, 255 bytes).
const MAX_LENGTH: usize = 180;

/// A domain such as `vm.internal`, in lower case and without a dot at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    text: String,
    name: Name,
}

/// Why a text is not a domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a domain for VMs: use labels of letters, digits and hyphens with dots between them, such as `vm.internal`"
)]
pub struct DomainError {
    /// The refused text, shortened.
    text: String,
}

impl Domain {
    /// The domain as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The domain as a DNS name.
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// A name directly below it.
    pub(crate) fn below(&self, label: &str) -> Name {
        self.name
            .prepend_label(label)
            .expect("a VM's name is a label, and a domain leaves room for one")
    }
}

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let refused = || DomainError {
            text: text.chars().take(80).flat_map(char::escape_debug).collect(),
        };
        let lower = text.to_ascii_lowercase();
        // A VM's name is a label of DNS, so it says what a label is.
        let labels = lower.split('.').all(|label| label.parse::<VmName>().is_ok());
        if !labels || lower.len() > MAX_LENGTH || lower == "localhost" {
            return Err(refused());
        }
        let name = Name::from_ascii(format!("{lower}.")).map_err(|_| refused())?;
        Ok(Self { text: lower, name })
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_labels_with_dots() {
        for good in ["vm.internal", "VM.Internal", "lab", "a.b.c-d.example"] {
            assert_eq!(
                good.parse::<Domain>().unwrap().as_str(),
                good.to_ascii_lowercase()
            );
        }
        for bad in [
            "",
            ".",
            "vm.internal.",
            ".vm",
            "a..b",
            "a b",
            "-a.b",
            "a_b",
            "localhost",
            "ü.x",
            &"a.".repeat(120),
        ] {
            assert!(bad.parse::<Domain>().is_err(), "{bad}");
        }
        assert_eq!(
            "vm.internal".parse::<Domain>().unwrap().below("web").to_string(),
            "web.vm.internal."
        );
    }
}
