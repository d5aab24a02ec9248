//! The words of nftables (libnftables-json(5)) that our rules are made of.

use std::borrow::Cow;
use std::collections::HashSet;

use nftables::expr::{
    CT, Expression, Fib, FibFlag, FibResult, Map, Meta, MetaKey, NamedExpression, Payload, PayloadBase,
    PayloadField, PayloadRaw, Prefix, Range, SetItem,
};
use nftables::stmt::{JumpTarget, Match, NAT, NATFamily, Operator, Reject, RejectType, Statement};
use nftables::types::RejectCode;

pub(super) type Expr = Expression<'static>;
pub(super) type Stmt = Statement<'static>;
/// One rule: what it asks, and what it does.
pub(super) type Rule = Vec<Stmt>;

pub(super) fn text(text: impl Into<Cow<'static, str>>) -> Expr {
    Expression::String(text.into())
}

pub(super) fn meta(key: MetaKey) -> Expr {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

/// The interface that a packet came in by.
pub(super) fn iifname() -> Expr {
    meta(MetaKey::Iifname)
}

/// The interface that it goes out by.
pub(super) fn oifname() -> Expr {
    meta(MetaKey::Oifname)
}

/// A field of a header: `field("ip", "saddr")`.
pub(super) fn field(protocol: &'static str, field: &'static str) -> Expr {
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(PayloadField {
        protocol: protocol.into(),
        field: field.into(),
    })))
}

/// The address that a neighbour solicitation or advertisement speaks of (RFC 4861, 4.3 and 4.4), 8 bytes into ICMPv6. The
/// nft of Debian 12 has no name for it yet.
pub(super) fn nd_target() -> Expr {
    Expression::Named(NamedExpression::Payload(Payload::PayloadRaw(PayloadRaw {
        base: PayloadBase::TH,
        offset: 64,
        len: 128,
    })))
}

pub(super) fn concat<const N: usize>(parts: [Expr; N]) -> Expr {
    Expression::Named(NamedExpression::Concat(parts.into()))
}

pub(super) fn set_of(items: impl IntoIterator<Item = Expr>) -> Expr {
    Expression::Named(NamedExpression::Set(
        items.into_iter().map(SetItem::Element).collect(),
    ))
}

pub(super) fn words(items: &[&'static str]) -> Expr {
    set_of(items.iter().map(|item| text(*item)))
}

pub(super) fn prefix(address: &'static str, len: u32) -> Expr {
    Expression::Named(NamedExpression::Prefix(Prefix {
        addr: Box::new(text(address)),
        len,
    }))
}

pub(super) fn range(first: &'static str, last: &'static str) -> Expr {
    Expression::Range(Box::new(Range {
        range: [text(first), text(last)],
    }))
}

fn matches(op: Operator, left: Expr, right: Expr) -> Stmt {
    Statement::Match(Match { left, right, op })
}

pub(super) fn is(left: Expr, right: Expr) -> Stmt {
    matches(Operator::EQ, left, right)
}

pub(super) fn is_not(left: Expr, right: Expr) -> Stmt {
    matches(Operator::NEQ, left, right)
}

/// Whether something is an element of the set of this name.
pub(super) fn within(left: Expr, set: &str) -> Stmt {
    is(left, text(format!("@{set}")))
}

pub(super) fn not_within(left: Expr, set: &str) -> Stmt {
    is_not(left, text(format!("@{set}")))
}

/// `ct state` or `ct status` has one of these.
pub(super) fn ct(key: &'static str, values: &[&'static str]) -> Stmt {
    let left = Expression::Named(NamedExpression::CT(CT {
        key: key.into(),
        family: None,
        dir: None,
    }));
    let right = match values {
        [value] => text(*value),
        values => Expression::List(values.iter().map(|value| text(*value)).collect()),
    };
    matches(Operator::IN, left, right)
}

/// The destination is an address of the host.
pub(super) fn to_this_host() -> Stmt {
    let fib = Fib {
        result: FibResult::Type,
        flags: HashSet::from([FibFlag::Daddr]),
    };
    is(Expression::Named(NamedExpression::Fib(fib)), text("local"))
}

fn look_up(key: Expr, map: &str) -> Expr {
    Expression::Named(NamedExpression::Map(Box::new(Map {
        key,
        data: text(format!("@{map}")),
    })))
}

/// Sends a packet to the address and port that two maps give for `key`.
pub(super) fn dnat(family: NATFamily, key: Expr, addresses: &str, ports: &str) -> Stmt {
    Statement::DNAT(Some(NAT {
        addr: Some(look_up(key.clone(), addresses)),
        family: Some(family),
        port: Some(look_up(key, ports)),
        flags: None,
    }))
}

pub(super) fn masquerade() -> Stmt {
    Statement::Masquerade(None)
}

pub(super) fn accept() -> Stmt {
    Statement::Accept(None)
}

pub(super) fn drop() -> Stmt {
    Statement::Drop(None)
}

pub(super) fn back() -> Stmt {
    Statement::Return(None)
}

/// Refuses with a word, so that a guest does not wait for what will never come.
pub(super) fn refuse() -> Stmt {
    Statement::Reject(Some(Reject {
        _type: Some(RejectType::ICMPX),
        expr: Some(RejectCode::AdminProhibited),
    }))
}

pub(super) fn jump(chain: &'static str) -> Stmt {
    Statement::Jump(JumpTarget { target: chain.into() })
}

pub(super) fn goto(chain: &'static str) -> Stmt {
    Statement::Goto(JumpTarget { target: chain.into() })
}
