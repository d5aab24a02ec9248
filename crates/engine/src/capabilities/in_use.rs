//! Which VMs there are, for checks of what they need: what nobody needs is allowed to be missing.

use offshoot_model::{BaseId, KernelId, VmName};
use offshoot_store::db::Db;

use crate::definition::VmRecord;

/// What one VM needs to start.
#[derive(Clone, Debug)]
pub(super) struct Needs {
    /// The VM.
    pub(super) name: VmName,
    /// What its image is called.
    pub(super) image: String,
    /// Its base.
    pub(super) base: BaseId,
    /// Its kernel bundle.
    pub(super) kernel: KernelId,
}

/// What each VM needs that can be read. That the database cannot be read is its own finding.
pub(super) async fn vms(db: &Db) -> Vec<Needs> {
    let rows = db.call(Db::vms).await.unwrap_or_default();
    let records = rows.into_iter().filter_map(|row| VmRecord::from_row(row).ok());
    records
        .map(|vm| Needs {
            name: vm.name,
            image: vm.definition.config.image,
            base: vm.base_id,
            kernel: vm.kernel_id,
        })
        .collect()
}

/// How many VMs are named before the rest is only counted.
const NAMED: usize = 3;

/// `VM a`, `VMs a, b`, or `VMs a, b, c and 4 more`.
pub(super) fn named(names: &[&VmName]) -> String {
    let shown: Vec<_> = names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
    let word = if names.len() == 1 { "VM" } else { "VMs" };
    match names.len().saturating_sub(NAMED) {
        0 => format!("{word} {}", shown.join(", ")),
        more => format!("{word} {} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A VM of this name, with a base and a kernel that all such VMs share.
    pub(in super::super) fn needs(name: &str) -> Needs {
        Needs {
            name: name.parse().unwrap(),
            image: "debian:bookworm".into(),
            base: BaseId::from_bytes(&[7; 16]),
            kernel: KernelId::from_bytes(&[7; 8]),
        }
    }

    #[test]
    fn some_are_named_and_the_rest_counted() {
        let names: Vec<VmName> = ["a", "b", "c", "d", "e"].map(|name| name.parse().unwrap()).into();
        let check = |count: usize, expected: &str| {
            assert_eq!(named(&names.iter().take(count).collect::<Vec<_>>()), expected);
        };
        check(1, "VM `a`");
        check(3, "VMs `a`, `b`, `c`");
        check(5, "VMs `a`, `b`, `c` and 2 more");
    }
}
