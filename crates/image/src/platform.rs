//! Platforms as OCI names them (image-spec, image-index.md): `linux/amd64`, `linux/arm64/v8`.

use std::fmt;
use std::str::FromStr;

use offshoot_model::{ErrorKind, Explain};

/// An operating system, an architecture in Go's words, and sometimes a variant of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, `riscv64` …
    pub architecture: String,
    /// `v8` of `arm64`, `v7` of `arm` …
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a platform: write OS/ARCHITECTURE, such as linux/amd64")]
pub struct PlatformError {
    /// The refused text, shortened.
    pub text: String,
}

impl Explain for PlatformError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        }
    }

    /// The platform that `text` names, or this machine's where there is no text.
    pub fn parse_or_host(text: Option<&str>) -> Result<Self, PlatformError> {
        text.map_or_else(|| Ok(Self::host()), str::parse)
    }

    /// Whether an image made for `offered` is what this platform asks for. A variant only counts where both name one:
    /// most images of the only variant there is do not.
    pub fn accepts(&self, offered: &Self) -> bool {
        let variants_agree = match (&self.variant, &offered.variant) {
            (Some(wanted), Some(offered)) => wanted == offered,
            _ => true,
        };
        self.os == offered.os && self.architecture == offered.architecture && variants_agree
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let parts: Vec<&str> = text.split('/').collect();
        let valid = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        match parts.as_slice() {
            [os, architecture, variant @ ..] if variant.len() <= 1 && parts.iter().all(valid) => Ok(Self {
                os: (*os).to_owned(),
                architecture: (*architecture).to_owned(),
                variant: variant.first().map(ToString::to_string),
            }),
            _ => Err(PlatformError {
                text: text.chars().take(80).collect(),
            }),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_back_and_compared() {
        for good in ["linux/amd64", "linux/arm64/v8", "windows/amd64"] {
            assert_eq!(good.parse::<Platform>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "linux/arm/v7/x",
            "linux/am d64",
            "linux/../x/y",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        let check = |wanted: &str, offered: &str, expected: bool| {
            let (wanted, offered) = (wanted.parse::<Platform>().unwrap(), offered.parse().unwrap());
            assert_eq!(wanted.accepts(&offered), expected, "{wanted} {offered}");
        };
        check("linux/arm64", "linux/arm64/v8", true);
        check("linux/arm64/v8", "linux/arm64", true);
        check("linux/arm/v7", "linux/arm/v6", false);
        check("linux/amd64", "linux/arm64", false);
        check("linux/amd64", "windows/amd64", false);
    }
}
