//! What this host offers for the firewall, and rules of others that would stop VMs.

use serde_json::Value;

use super::forwarding::Forwarding;
use super::nft::{self, NftError};
use super::plan;
use super::state::{BRIDGES, FirewallState, TableName};

/// A chain of somebody else that drops what it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Its table, with the family: `ip filter`.
    pub table: String,
    /// Its name.
    pub chain: String,
    /// Docker made it, and has a chain for rules of others.
    pub docker: bool,
}

/// What was found.
#[derive(Debug)]
pub struct Facts {
    /// Whether nft and the kernel can do all that we ask of them.
    pub usable: Result<(), NftError>,
    /// What would stop VMs.
    pub obstacles: Vec<Obstacle>,
}

/// Asks nft, without changing anything.
pub(super) fn look(table: &TableName) -> Facts {
    let everything = plan(table, &FirewallState::default(), &Forwarding::default());
    let usable = nft::rehearse(&everything.replace());
    let chains = nft::list(&["chains"]).unwrap_or_default();
    let suspects = dropping(&chains, table);
    let obstacles = suspects
        .into_iter()
        .filter(|suspect| {
            let words: Vec<_> = std::iter::once("table").chain(suspect.table.split(' ')).collect();
            // One that cannot be read is taken for what it looks like.
            !nft::list(&words).is_ok_and(|listing| knows_us(&listing))
        })
        .collect();
    Facts { usable, obstacles }
}

/// The chains for forwarded packets that drop what no rule of theirs accepts.
fn dropping(chains: &Value, ours: &TableName) -> Vec<Obstacle> {
    let all: Vec<_> = nft::objects(chains, "chain").collect();
    let of = |chain: &Value, key: &str| chain[key].as_str().unwrap_or_default().to_owned();
    let dropping = all.iter().filter(|chain| {
        let (hook, policy, family) = (of(chain, "hook"), of(chain, "policy"), of(chain, "family"));
        hook == "forward"
            && policy == "drop"
            && matches!(family.as_str(), "ip" | "ip6" | "inet" | "bridge")
            && chain["table"] != ours.as_str()
    });
    dropping
        .map(|chain| Obstacle {
            table: format!("{} {}", of(chain, "family"), of(chain, "table")),
            chain: of(chain, "name"),
            docker: all.iter().any(|other| {
                other["family"] == chain["family"]
                    && other["table"] == chain["table"]
                    && other["name"] == "DOCKER-USER"
            }),
        })
        .collect()
}

/// Whether a table has a rule that names our bridges.
fn knows_us(listing: &Value) -> bool {
    fn names_us(value: &Value) -> bool {
        match value {
            Value::String(text) => text.starts_with(BRIDGES),
            Value::Array(values) => values.iter().any(names_us),
            Value::Object(fields) => fields.values().any(names_us),
            _ => false,
        }
    }
    nft::objects(listing, "rule").any(names_us)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_chain_of_others_that_drops_is_found() {
        let chain = |family: &str, table: &str, name: &str, hook: &str, policy: &str| json!({"chain": {"family": family, "table": table, "name": name, "hook": hook, "policy": policy}});
        let ours = TableName::new([1, 2, 3, 4]);
        let chains = json!({"nftables": [
            chain("ip", "filter", "FORWARD", "forward", "drop"),
            {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}},
            chain("inet", "fw", "forward", "forward", "drop"),
            chain("inet", "fw", "input", "input", "drop"),
            chain("ip6", "filter", "FORWARD", "forward", "accept"),
            chain("inet", ours.as_str(), "forward", "forward", "drop"),
        ]});
        let found: Vec<_> = dropping(&chains, &ours)
            .into_iter()
            .map(|found| (found.table, found.docker))
            .collect();
        assert_eq!(
            found,
            [("ip filter".to_owned(), true), ("inet fw".to_owned(), false)]
        );
        assert!(dropping(&json!({}), &ours).is_empty());
    }

    #[test]
    fn a_table_that_names_our_bridges_knows_us() {
        let rule = |interface: &str| {
            json!({"nftables": [{"rule": {"expr": [
                {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": interface}}, {"accept": null},
            ]}}]})
        };
        assert!(knows_us(&rule("ofs-*")));
        assert!(!knows_us(&rule("docker0")));
    }
}
