//! Networks of VMs, and which VM has which address on them.

use std::net::{Ipv4Addr, Ipv6Addr};

use offshoot_model::{Mac, Network, NetworkName, VmName};
use rusqlite::{OptionalExtension as _, Transaction, params};

use super::{Db, DbError};

/// What a VM was given; written and removed together with the VM's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRow {
    /// The network.
    pub network: NetworkName,
    /// Unique on it.
    pub ipv4: Ipv4Addr,
    /// Unique on it.
    pub ipv6: Ipv6Addr,
    /// Unique on it.
    pub mac: Mac,
}

/// What is taken on a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenAddresses {
    /// Every address that a VM has, running or not, lowest first.
    pub ipv4: Vec<Ipv4Addr>,
    /// The one that was handed out last; it may be free again.
    pub last: Option<Ipv4Addr>,
}

fn unreadable(source: impl std::error::Error + Send + Sync + 'static) -> DbError {
    DbError::Row {
        what: "network",
        source: Box::new(source),
    }
}

/// Writes an address within the transaction that writes its VM.
pub(super) fn insert(transaction: &Transaction<'_>, id: &str, row: &AddressRow) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO addresses (network, ipv4, ipv6, mac, vm_id) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            row.network.as_str(),
            row.ipv4.to_string(),
            row.ipv6.to_string(),
            row.mac.to_string(),
            id,
        ],
    )?;
    transaction.execute(
        "UPDATE networks SET last_ipv4 = ?2 WHERE name = ?1",
        [row.network.as_str(), &row.ipv4.to_string()],
    )?;
    Ok(())
}

impl Db {
    /// Writes a new network.
    pub fn insert_network(&self, network: &Network) -> Result<(), DbError> {
        self.with("write a network", |connection| {
            connection.execute(
                "INSERT INTO networks (name, bridge, ipv4, ipv6, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    network.name.as_str(),
                    network.bridge,
                    network.ipv4.to_string(),
                    network.ipv6.to_string(),
                    network.created_ms as i64,
                ],
            )
        })?;
        Ok(())
    }

    /// Every network, oldest first.
    pub fn networks(&self) -> Result<Vec<Network>, DbError> {
        let rows: Vec<([String; 4], i64)> = self.with("list networks", |connection| {
            connection
                .prepare_cached(
                    "SELECT name, bridge, ipv4, ipv6, created_ms FROM networks ORDER BY created_ms, name",
                )?
                .query_map([], |row| {
                    Ok(([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?], row.get(4)?))
                })?
                .collect()
        })?;
        rows.into_iter()
            .map(|([name, bridge, ipv4, ipv6], created_ms)| {
                Ok(Network {
                    name: name.parse().map_err(unreadable)?,
                    bridge,
                    ipv4: ipv4.parse().map_err(unreadable)?,
                    ipv6: ipv6.parse().map_err(unreadable)?,
                    created_ms: created_ms.unsigned_abs(),
                })
            })
            .collect()
    }

    /// Forgets a network unless a VM is on it; gives the names of those that are.
    pub fn remove_network(&self, name: &NetworkName) -> Result<Vec<VmName>, DbError> {
        let on_it: Vec<String> = self.with("forget a network", |connection| {
            let transaction = connection.transaction()?;
            let on_it = transaction
                .prepare_cached(
                    "SELECT vms.name FROM addresses JOIN vms ON vms.id = addresses.vm_id
                     WHERE addresses.network = ?1 ORDER BY vms.name",
                )?
                .query_map([name.as_str()], |row| row.get(0))?
                .collect::<Result<Vec<_>, _>>()?;
            if on_it.is_empty() {
                transaction.execute("DELETE FROM networks WHERE name = ?1", [name.as_str()])?;
            }
            transaction.commit()?;
            Ok(on_it)
        })?;
        on_it
            .into_iter()
            .map(|name| name.parse().map_err(unreadable))
            .collect()
    }

    /// What is taken on a network; nothing on one that is unknown.
    pub fn taken_addresses(&self, name: &NetworkName) -> Result<TakenAddresses, DbError> {
        let (taken, last): (Vec<String>, Option<String>) =
            self.with("read a network's addresses", |connection| {
                let taken = connection
                    .prepare_cached("SELECT ipv4 FROM addresses WHERE network = ?1")?
                    .query_map([name.as_str()], |row| row.get(0))?
                    .collect::<Result<Vec<_>, _>>()?;
                let last = connection
                    .prepare_cached("SELECT last_ipv4 FROM networks WHERE name = ?1")?
                    .query_row([name.as_str()], |row| row.get(0))
                    .optional()?;
                Ok((taken, last.flatten()))
            })?;
        let mut ipv4 = taken
            .iter()
            .map(|text| text.parse().map_err(unreadable))
            .collect::<Result<Vec<Ipv4Addr>, _>>()?;
        ipv4.sort();
        Ok(TakenAddresses {
            ipv4,
            last: last.map(|text| text.parse().map_err(unreadable)).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::vm_rows::tests::row;

    fn network(n: u8, name: &str) -> Network {
        Network {
            name: name.parse().unwrap(),
            bridge: format!("ofs-{n}"),
            ipv4: format!("10.1.{n}.0/24").parse().unwrap(),
            ipv6: format!("fd00:{n}::/64").parse().unwrap(),
            created_ms: u64::from(n),
        }
    }

    fn address(network: &Network, n: u8) -> AddressRow {
        let ipv4 = Ipv4Addr::from(u32::from(network.ipv4.network()) + u32::from(n));
        AddressRow {
            network: network.name.clone(),
            ipv4,
            ipv6: Ipv6Addr::from(u128::from(network.ipv6.network()) + u128::from(n)),
            mac: Mac([2, 0, 0, 0, 0, n]),
        }
    }

    #[test]
    fn networks_come_back_as_they_were_written_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let (one, two) = (network(1, "one"), network(2, "two"));
        db.insert_network(&two).unwrap();
        db.insert_network(&one).unwrap();
        assert_eq!(db.networks().unwrap(), [one.clone(), two.clone()]);
        assert!(db.insert_network(&one).is_err());
        for same in [
            Network {
                bridge: one.bridge.clone(),
                ..network(3, "x")
            },
            Network {
                ipv4: one.ipv4,
                ..network(3, "x")
            },
            Network {
                ipv6: one.ipv6,
                ..network(3, "x")
            },
        ] {
            assert!(db.insert_network(&same).is_err(), "{same:?}");
        }
    }

    #[test]
    fn addresses_come_and_go_with_their_vm() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let net = network(1, "one");
        db.insert_network(&net).unwrap();
        db.insert_vm(&row(1, "web"), Some(&address(&net, 9)), &[])
            .unwrap();
        db.insert_vm(&row(2, "db"), Some(&address(&net, 2)), &[]).unwrap();
        let taken = db.taken_addresses(&net.name).unwrap();
        assert_eq!(taken.ipv4, [address(&net, 2).ipv4, address(&net, 9).ipv4]);
        assert_eq!(taken.last, Some(address(&net, 2).ipv4));

        assert_eq!(db.remove_network(&net.name).unwrap().len(), 2, "it is in use");
        assert_eq!(db.networks().unwrap().len(), 1);
        db.remove_vm(&row(1, "web").id, &[]).unwrap();
        db.remove_vm(&row(2, "db").id, &[]).unwrap();
        let taken = db.taken_addresses(&net.name).unwrap();
        assert_eq!(taken.ipv4, [] as [Ipv4Addr; 0]);
        assert_eq!(taken.last, Some(address(&net, 2).ipv4), "it is remembered");
        assert_eq!(db.remove_network(&net.name).unwrap(), []);
        assert_eq!(db.networks().unwrap(), []);
    }

    #[test]
    fn a_vm_whose_address_is_taken_is_not_written_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let (net, other) = (network(1, "one"), network(2, "two"));
        db.insert_network(&net).unwrap();
        db.insert_network(&other).unwrap();
        let given = address(&net, 2);
        db.insert_vm(&row(1, "web"), Some(&given), &[]).unwrap();
        let free = address(&net, 3);
        for same in [
            AddressRow {
                ipv4: given.ipv4,
                ..free.clone()
            },
            AddressRow {
                ipv6: given.ipv6,
                ..free.clone()
            },
            AddressRow {
                mac: given.mac,
                ..free.clone()
            },
            AddressRow {
                network: "unknown".parse().unwrap(),
                ..free.clone()
            },
        ] {
            assert!(db.insert_vm(&row(2, "db"), Some(&same), &[]).is_err(), "{same:?}");
            assert_eq!(db.vms().unwrap().len(), 1);
        }
        // Each network has addresses of its own.
        let elsewhere = AddressRow {
            network: other.name,
            ..given
        };
        db.insert_vm(&row(2, "db"), Some(&elsewhere), &[]).unwrap();
    }
}
