//! Which TAPs of a pool there are, and which there should be: a pure function of the namespace's interfaces.
//!
//! ```text
//! bridge ofs-1a2b3c4d ── osp-1a2b3c4d000, osp-1a2b3c4d001 …    idle: persistent, switched off
//!                     └─ os-<VM's id>                          a VM's
//! ```
//!
//! The name says to which bridge an idle TAP belongs, and bridges of another daemon have other names. Nothing else is
//! remembered of it, so that a daemon that is started again finds what there is.

use std::collections::BTreeSet;

use crate::links::{Link, LinkKind};

/// What the name of an idle TAP begins with; the digits of its bridge and three of its own follow, and 15 characters are
/// full.
const PREFIX: &str = "osp-";
/// What names of bridges begin with.
const BRIDGE_PREFIX: &str = "ofs-";
/// The most that one bridge can have: three digits.
pub const MOST: usize = 0x1000;

/// What is to be done for one bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPlan {
    /// Those that can be taken.
    pub ready: Vec<String>,
    /// Those that must go: too many, on no bridge, or not as an idle one is.
    pub remove: Vec<Link>,
    /// The names of those that are missing.
    pub missing: Vec<String>,
}

/// What of the interfaces `links` belongs to the pool of `bridge`, which shall have `size`. Without a bridge of that name it has
/// none.
pub fn plan(links: &[Link], bridge: &str, size: usize) -> PoolPlan {
    let Some(own) = Names::of(bridge) else {
        return PoolPlan::default();
    };
    let there = links
        .iter()
        .find(|link| link.kind == LinkKind::Bridge && link.name == bridge);
    let size = if there.is_some() { size.min(MOST) } else { 0 };
    let mut plan = PoolPlan::default();
    let mut idle: Vec<_> = links.iter().filter(|link| own.is(link)).collect();
    idle.sort_by(|one, other| one.name.cmp(&other.name));
    for link in idle {
        // One that is switched on passes packets of whoever has it open.
        let whole = there.is_some_and(|bridge| link.bridge == Some(bridge.index)) && !link.up;
        if whole && plan.ready.len() < size {
            plan.ready.push(link.name.clone());
        } else {
            plan.remove.push(link.clone());
        }
    }
    let taken: BTreeSet<_> = links.iter().map(|link| link.name.as_str()).collect();
    plan.missing = (0..MOST)
        .map(|number| own.name(number))
        .filter(|name| !taken.contains(name.as_str()))
        .take(size - plan.ready.len())
        .collect();
    plan
}

/// Whether an interface is an idle TAP of this bridge, by its name.
pub fn is_idle(link: &Link, bridge: &str) -> bool {
    Names::of(bridge).is_some_and(|own| own.is(link))
}

/// The names of one bridge's idle TAPs.
struct Names<'a> {
    digits: &'a str,
}

impl<'a> Names<'a> {
    /// Nothing for what is no bridge of a network.
    fn of(bridge: &'a str) -> Option<Self> {
        let digits = bridge.strip_prefix(BRIDGE_PREFIX)?;
        (digits.len() == 8).then_some(Self { digits })
    }

    fn name(&self, number: usize) -> String {
        format!("{PREFIX}{}{number:03x}", self.digits)
    }

    fn is(&self, link: &Link) -> bool {
        let number = link
            .name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_prefix(self.digits));
        let three = |number: &str| number.len() == 3 && number.bytes().all(|b| b.is_ascii_hexdigit());
        link.kind == LinkKind::Tun && number.is_some_and(three)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: &str = "ofs-1a2b3c4d";

    fn link(index: u32, name: &str, kind: LinkKind, bridge: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            kind,
            bridge,
            mac: None,
            mtu: 1500,
            up: false,
        }
    }

    fn bridge() -> Link {
        link(1, BRIDGE, LinkKind::Bridge, None)
    }

    fn idle(index: u32, number: &str) -> Link {
        link(index, &format!("osp-1a2b3c4d{number}"), LinkKind::Tun, Some(1))
    }

    fn check(links: &[Link], size: usize, ready: &[&str], remove: &[&str], missing: &[&str]) {
        let plan = plan(links, BRIDGE, size);
        let short = |name: &String| name.trim_start_matches("osp-1a2b3c4d").to_owned();
        assert_eq!(
            plan.ready.iter().map(short).collect::<Vec<_>>(),
            ready,
            "ready of {links:?}"
        );
        assert_eq!(
            plan.remove
                .iter()
                .map(|link| short(&link.name))
                .collect::<Vec<_>>(),
            remove,
            "to remove of {links:?}"
        );
        assert_eq!(
            plan.missing.iter().map(short).collect::<Vec<_>>(),
            missing,
            "missing in {links:?}"
        );
    }

    #[test]
    fn what_is_there_is_adopted_and_what_is_missing_is_made() {
        check(&[bridge()], 2, &[], &[], &["000", "001"]);
        check(&[bridge(), idle(2, "001")], 2, &["001"], &[], &["000"]);
        check(
            &[bridge(), idle(3, "0ff"), idle(2, "001")],
            2,
            &["001", "0ff"],
            &[],
            &[],
        );
    }

    #[test]
    fn a_smaller_pool_gives_back_the_rest() {
        let three = [bridge(), idle(2, "000"), idle(3, "001"), idle(4, "002")];
        check(&three, 1, &["000"], &["001", "002"], &[]);
        check(&three, 0, &[], &["000", "001", "002"], &[]);
    }

    #[test]
    fn without_a_bridge_there_is_no_pool() {
        check(&[], 2, &[], &[], &[]);
        check(&[idle(2, "000")], 2, &[], &["000"], &[]);
        // Something else of the bridge's name.
        check(&[link(1, BRIDGE, LinkKind::Other, None)], 2, &[], &[], &[]);
    }

    #[test]
    fn one_that_somebody_changed_goes_and_its_name_is_not_used_meanwhile() {
        let on = Link {
            up: true,
            ..idle(2, "000")
        };
        let off_the_bridge = Link {
            bridge: None,
            ..idle(3, "001")
        };
        check(
            &[bridge(), on, off_the_bridge],
            2,
            &[],
            &["000", "001"],
            &["002", "003"],
        );
    }

    #[test]
    fn nothing_of_others_is_touched() {
        for other in [
            "osp-1a2b3c4e000",
            "osp-1a2b3c4d",
            "osp-1a2b3c4d00",
            "osp-1a2b3c4d00g",
            "os-1a2b3c4d0000",
            "tap0",
        ] {
            check(
                &[bridge(), link(2, other, LinkKind::Tun, Some(1))],
                0,
                &[],
                &[],
                &[],
            );
        }
        check(
            &[bridge(), link(2, "osp-1a2b3c4d000", LinkKind::Other, Some(1))],
            1,
            &[],
            &[],
            &["001"],
        );
        assert_eq!(plan(&[bridge()], "br0", 3), PoolPlan::default());
    }

    #[test]
    fn names_are_as_long_as_names_may_be() {
        let names = plan(&[bridge()], BRIDGE, usize::MAX).missing;
        assert_eq!(names.len(), MOST);
        assert!(names.iter().all(|name| name.len() == 15), "{:?}", names.last());
    }
}
