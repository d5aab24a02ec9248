//! From what is known to the bytes of an answer.

use hickory_proto::op::{Edns, Message, OpCode, ResponseCode};
use hickory_proto::rr::Record;
use hickory_proto::serialize::binary::{BinEncodable as _, BinEncoder};

use super::question::Question;

/// The longest answer by UDP: what passes every link unfragmented (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
/// What a client without EDNS can take by UDP (RFC 1035, 4.2.1).
const PLAIN_UDP: u16 = 512;
/// The bit in the third byte that says that something is missing.
const TRUNCATED: u8 = 0x02;

/// What a question is answered with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) code: ResponseCode,
    /// Whether it is ours to say.
    pub(crate) authoritative: bool,
    pub(crate) answers: Vec<Record>,
    pub(crate) authorities: Vec<Record>,
}

impl Reply {
    /// Nothing but a code.
    pub(crate) fn empty(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            answers: Vec::new(),
            authorities: Vec::new(),
        }
    }
}

/// The longest answer by UDP to this client.
pub(crate) fn udp_limit(question: &Question) -> u16 {
    question
        .edns
        .map_or(PLAIN_UDP, |edns| edns.payload.clamp(PLAIN_UDP, MAX_UDP))
}

/// The bytes of an answer, at most `limit`: what does not fit is left out, and the client told so. Nothing if there is
/// no way to say it.
pub(crate) fn encode(question: &Question, reply: &Reply, limit: u16) -> Option<Vec<u8>> {
    let mut message = Message::response(question.id, OpCode::Query);
    message.metadata.recursion_desired = question.recursion;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.metadata.authoritative = reply.authoritative;
    message.metadata.response_code = reply.code;
    message.add_query(question.query.clone());
    message.answers.clone_from(&reply.answers);
    message.authorities.clone_from(&reply.authorities);
    if let Some(client) = question.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP).set_dnssec_ok(client.dnssec_ok);
        message.set_edns(edns);
    }
    let whole = emit(&message, limit)?;
    if whole[2] & TRUNCATED == 0 {
        return Some(whole);
    }
    // An answer says all without the authorities.
    if !message.answers.is_empty() && !message.authorities.is_empty() {
        message.authorities.clear();
        let answers = emit(&message, limit)?;
        if answers[2] & TRUNCATED == 0 {
            return Some(answers);
        }
    }
    emit(&message.truncate(), limit)
}

fn emit(message: &Message, limit: u16) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    match message.emit(&mut encoder) {
        Ok(()) => Some(bytes),
        Err(error) => {
            tracing::debug!(%error, "an answer cannot be written");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::{RData, RecordType};

    use super::*;
    use crate::dns::question::tests::asked;
    use crate::dns::question::{Judged, judge};

    fn question(payload: Option<u16>) -> Question {
        let mut message = asked("many.example.", RecordType::A);
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            message.set_edns(edns);
        }
        match judge(&message.to_vec().unwrap()) {
            Judged::Question(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    fn reply(addresses: u32) -> Reply {
        let record = |n: u32| {
            let name = "many.example.".parse().unwrap();
            Record::from_rdata(name, 60, RData::from(Ipv4Addr::from(0x0a00_0000 + n)))
        };
        Reply {
            code: ResponseCode::NoError,
            authoritative: false,
            answers: (0..addresses).map(record).collect(),
            authorities: vec![record(0)],
        }
    }

    #[test]
    fn what_does_not_fit_is_said_to_be_missing() {
        for (payload, addresses, limit, whole) in [
            (None, 20, 512, true),
            (None, 40, 512, false),
            (Some(1000), 40, 1000, true),
            (Some(65000), 70, 1232, true),
            (Some(65000), 90, 1232, false),
            (Some(0), 40, 512, false),
        ] {
            let question = question(payload);
            assert_eq!(udp_limit(&question), limit);
            let bytes = encode(&question, &reply(addresses), limit).unwrap();
            assert!(bytes.len() <= usize::from(limit), "{}", bytes.len());
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!(message.truncation, !whole, "{payload:?} {addresses}");
            assert_eq!(message.edns.is_some(), payload.is_some());
            let expected = if whole { addresses as usize } else { 0 };
            assert_eq!(message.answers.len(), expected);
        }
    }

    #[test]
    fn by_tcp_all_of_it_fits() {
        let bytes = encode(&question(None), &reply(2000), u16::MAX).unwrap();
        assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 2000);
    }
}
