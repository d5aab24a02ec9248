//! Which crate may use which: the arrows of ARCHITECTURE.md point downwards only.

use std::path::Path;

use anyhow::{Context as _, Result};

/// Every crate of the workspace with those it may use directly, highest first.
const ARROWS: [(&str, &[&str]); 18] = [
    ("e2e", &[]),
    ("bench", &["agent-proto", "model", "rootfs", "sys"]),
    ("bench-init", &[]),
    ("fake-vmm", &["agent-proto", "sys", "vmm"]),
    ("cli", &["api", "model"]),
    (
        "daemon",
        &[
            "agent-proto",
            "api",
            "engine",
            "image",
            "kernel",
            "model",
            "net",
            "rootfs",
            "store",
            "sys",
            "vmm",
        ],
    ),
    (
        "engine",
        &[
            "agent-proto",
            "kernel",
            "model",
            "net",
            "rootfs",
            "store",
            "sys",
            "vmm",
        ],
    ),
    ("rootfs", &["image", "model", "store", "sys"]),
    ("image", &["model", "store", "sys"]),
    ("kernel", &["model", "sys"]),
    ("vmm", &["model", "sys"]),
    ("net", &["model", "sys"]),
    ("store", &["model", "sys"]),
    ("api", &["model"]),
    ("agent", &["agent-proto", "model"]),
    ("agent-proto", &["model"]),
    ("sys", &["model"]),
    ("model", &[]),
];

/// Complains about every dependency that no arrow allows, and every crate that has no row.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for entry in std::fs::read_dir(root.join("crates")).context("cannot list crates")? {
        let folder = entry?.path();
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let manifest = folder.join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest)
            .with_context(|| format!("cannot read {}", manifest.display()))?;
        let parsed: toml::Table = text
            .parse()
            .with_context(|| format!("cannot parse {}", manifest.display()))?;
        let Some((_, allowed)) = ARROWS.iter().find(|(row, _)| *row == name) else {
            complaints.push(format!("crates/{name}: no row in xtask's arrows"));
            continue;
        };
        let used = parsed
            .get("dependencies")
            .and_then(toml::Value::as_table)
            .into_iter()
            .flatten();
        for (dependency, _) in used {
            if let Some(other) = dependency.strip_prefix("offshoot-")
                && !allowed.contains(&other)
            {
                complaints.push(format!(
                    "crates/{name} may not use crates/{other}: the arrows point downwards"
                ));
            }
        }
    }
    Ok(complaints)
}
