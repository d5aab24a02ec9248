//! Tables as values: sets of elements and chains of rules. What differs between two of them is one transaction.
//!
//! Nearly everything that comes and goes with a VM is an element of a set, so that a change is a few elements,
//! however many VMs there are.

use std::collections::BTreeMap;

use nftables::batch::Batch;
use nftables::expr::{Expression, NamedExpression};
use nftables::schema::{
    Chain, Element, FlushObject, Map, NfCmd, NfListObject, Nftables, Rule as RuleObject, Set, SetType,
    SetTypeValue, Table,
};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};

use super::state::TableName;
use super::words::{Expr, Rule, text};

/// The families in which we have a table.
pub(super) const FAMILIES: [NfFamily; 2] = [NfFamily::INet, NfFamily::Bridge];

/// A set, or a map when its elements have values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetPlan {
    pub(super) family: NfFamily,
    pub(super) name: &'static str,
    pub(super) key: Vec<SetType>,
    pub(super) value: Option<SetType>,
    /// Keys in their parts, each with its value.
    pub(super) elements: BTreeMap<Vec<String>, Option<String>>,
}

/// Where the kernel calls a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) kind: NfChainType,
    pub(super) hook: NfHook,
    pub(super) priority: i32,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChainPlan {
    pub(super) family: NfFamily,
    pub(super) name: &'static str,
    /// Nothing: other chains jump to it.
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Rule>,
}

/// All of our tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    table: TableName,
    sets: Vec<SetPlan>,
    chains: Vec<ChainPlan>,
}

impl Ruleset {
    pub(super) fn new(table: TableName, sets: Vec<SetPlan>, chains: Vec<ChainPlan>) -> Self {
        Self { table, sets, chains }
    }

    /// The transaction that makes the tables, whatever was in them before.
    pub fn replace(&self) -> Nftables<'static> {
        let mut batch = Batch::new();
        forget(&mut batch, &self.table);
        for family in FAMILIES {
            batch.add(table(&self.table, family));
        }
        for set in &self.sets {
            batch.add(self.set(set));
        }
        // Chains before rules: a rule may jump to any of them.
        for chain in &self.chains {
            batch.add(NfListObject::Chain(self.chain(chain)));
        }
        for chain in &self.chains {
            self.add_rules(&mut batch, chain);
        }
        batch.to_nftables()
    }

    /// The transaction that makes this of `before`; nothing when they are the same.
    pub fn change(&self, before: &Self) -> Option<Nftables<'static>> {
        if self == before {
            return None;
        }
        let mut batch = Batch::new();
        for (set, old) in self.sets.iter().zip(&before.sets) {
            let gone = old
                .elements
                .iter()
                .filter(|(key, value)| set.elements.get(*key) != Some(*value));
            if let Some(element) = self.elements(set, gone, false) {
                batch.delete(element);
            }
            let new = set
                .elements
                .iter()
                .filter(|(key, value)| old.elements.get(*key) != Some(*value));
            if let Some(element) = self.elements(set, new, true) {
                batch.add(element);
            }
        }
        for (chain, old) in self.chains.iter().zip(&before.chains) {
            if chain.rules != old.rules {
                batch.add_cmd(NfCmd::Flush(FlushObject::Chain(self.chain(chain))));
                self.add_rules(&mut batch, chain);
            }
        }
        Some(batch.to_nftables())
    }

    /// The transaction after which there are no such tables, whether there were any or not.
    pub fn remove(name: &TableName) -> Nftables<'static> {
        let mut batch = Batch::new();
        forget(&mut batch, name);
        batch.to_nftables()
    }

    fn add_rules(&self, batch: &mut Batch<'static>, chain: &ChainPlan) {
        for rule in &chain.rules {
            batch.add(NfListObject::Rule(RuleObject {
                family: chain.family,
                table: self.table.as_str().to_owned().into(),
                chain: chain.name.into(),
                expr: rule.clone().into(),
                handle: None,
                index: None,
                comment: None,
            }));
        }
    }

    fn chain(&self, chain: &ChainPlan) -> Chain<'static> {
        Chain {
            family: chain.family,
            table: self.table.as_str().to_owned().into(),
            name: chain.name.into(),
            _type: chain.hook.map(|hook| hook.kind),
            hook: chain.hook.map(|hook| hook.hook),
            prio: chain.hook.map(|hook| hook.priority),
            policy: chain.hook.map(|_| NfChainPolicy::Accept),
            ..Chain::default()
        }
    }

    fn set(&self, set: &SetPlan) -> NfListObject<'static> {
        let table = self.table.as_str().to_owned().into();
        let set_type = match set.key.as_slice() {
            [one] => SetTypeValue::Single(*one),
            several => SetTypeValue::Concatenated(several.to_vec().into()),
        };
        let elements: Vec<_> = set
            .elements
            .iter()
            .map(|(key, value)| expression(key, value.as_ref(), true))
            .collect();
        // The JSON of an empty list of elements is an error to nft.
        let elem = (!elements.is_empty()).then_some(elements.into());
        match set.value {
            None => NfListObject::Set(Box::new(Set {
                family: set.family,
                table,
                name: set.name.into(),
                set_type,
                elem,
                ..Set::default()
            })),
            Some(value) => NfListObject::Map(Box::new(Map {
                family: set.family,
                table,
                name: set.name.into(),
                set_type,
                map: SetTypeValue::Single(value),
                elem,
                ..Map::default()
            })),
        }
    }

    fn elements<'a>(
        &self,
        set: &SetPlan,
        elements: impl Iterator<Item = (&'a Vec<String>, &'a Option<String>)>,
        with_values: bool,
    ) -> Option<NfListObject<'static>> {
        let elem: Vec<_> = elements
            .map(|(key, value)| expression(key, value.as_ref(), with_values))
            .collect();
        (!elem.is_empty()).then(|| {
            NfListObject::Element(Element {
                family: set.family,
                table: self.table.as_str().to_owned().into(),
                name: set.name.into(),
                elem: elem.into(),
            })
        })
    }
}

/// A table must be there to be deleted.
fn forget(batch: &mut Batch<'static>, name: &TableName) {
    for family in FAMILIES {
        batch.add(table(name, family));
        batch.delete(table(name, family));
    }
}

fn table(name: &TableName, family: NfFamily) -> NfListObject<'static> {
    NfListObject::Table(Table {
        family,
        name: name.as_str().to_owned().into(),
        handle: None,
    })
}

fn expression(key: &[String], value: Option<&String>, with_value: bool) -> Expr {
    let key = match key {
        [one] => text(one.clone()),
        parts => Expression::Named(NamedExpression::Concat(parts.iter().cloned().map(text).collect())),
    };
    match value.filter(|_| with_value) {
        Some(value) => Expression::List(vec![key, text(value.clone())]),
        None => key,
    }
}

/// A set with these elements.
pub(super) fn set<const N: usize>(
    family: NfFamily,
    name: &'static str,
    key: [SetType; N],
    elements: impl IntoIterator<Item = [String; N]>,
) -> SetPlan {
    SetPlan {
        family,
        name,
        key: key.into(),
        value: None,
        elements: elements.into_iter().map(|key| (key.into(), None)).collect(),
    }
}

/// A chain that other chains jump to.
pub(super) fn chain(family: NfFamily, name: &'static str, rules: Vec<Rule>) -> ChainPlan {
    ChainPlan {
        family,
        name,
        hook: None,
        rules,
    }
}

/// A chain that the kernel calls.
pub(super) fn base_chain(
    family: NfFamily,
    name: &'static str,
    (kind, hook, priority): (NfChainType, NfHook, i32),
    rules: Vec<Rule>,
) -> ChainPlan {
    ChainPlan {
        hook: Some(Hook { kind, hook, priority }),
        ..chain(family, name, rules)
    }
}
