//! From bytes to a question, or to what the sender of something else is told.
//!
//! The header is looked at before the rest is decoded: what its counts promise costs memory.

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};

use super::measure::{self, Kind};
use super::reply::{self, Reply};

/// The longest question. One name of 255 bytes with every option that resolvers send is below 1 KiB.
pub(crate) const MAX_QUESTION: usize = 4096;

/// A DNS header (RFC 1035, 4.1.1).
const HEADER: usize = 12;

/// Bytes of a client, judged.
#[derive(Debug)]
pub(crate) enum Judged {
    /// A question.
    Question(Box<Question>),
    /// Something else, and what it is answered with.
    Refused(Vec<u8>),
    /// Something that must not be answered.
    Silence,
}

/// One question with what its answer depends on.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    /// The number that the answer repeats.
    pub(crate) id: u16,
    /// Whether others may be asked.
    pub(crate) recursion: bool,
    /// Whether the client checks signatures by itself.
    pub(crate) checking_disabled: bool,
    /// The client's EDNS, if it has it.
    pub(crate) edns: Option<ClientEdns>,
    /// What is asked.
    pub(crate) query: Query,
}

/// What a client says by EDNS (RFC 6891).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientEdns {
    /// The longest answer by UDP that it can take.
    pub(crate) payload: u16,
    /// Whether it wants signatures.
    pub(crate) dnssec_ok: bool,
}

/// Judges what a client sent.
pub(crate) fn judge(bytes: &[u8]) -> Judged {
    let Some(header) = bytes.first_chunk::<HEADER>() else {
        measure::ignored();
        return Judged::Silence;
    };
    let [id_high, id_low, flags, ..] = *header;
    // An answer that is answered could go round for ever.
    if flags & 0x80 != 0 {
        measure::ignored();
        return Judged::Silence;
    }
    let refused = |code: ResponseCode| {
        measure::answered(Kind::Other, code);
        let mut answer = [0; HEADER];
        answer[0] = id_high;
        answer[1] = id_low;
        // A response, with the same operation and the same wish for recursion.
        answer[2] = 0x80 | (flags & 0x79);
        answer[3] = code.low();
        Judged::Refused(answer.to_vec())
    };
    if flags & 0x78 != 0 {
        return refused(ResponseCode::NotImp);
    }
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let (questions, answers, authorities, additional) = (count(4), count(6), count(8), count(10));
    // IXFR has one SOA as authority; OPT, TSIG and SIG(0) are additional.
    if questions != 1 || answers != 0 || authorities > 1 || additional > 4 || bytes.len() > MAX_QUESTION {
        return refused(ResponseCode::FormErr);
    }
    let Ok(message) = Message::from_vec(bytes) else {
        return refused(ResponseCode::FormErr);
    };
    let (OpCode::Query, MessageType::Query, [query]) =
        (message.op_code, message.message_type, message.queries.as_slice())
    else {
        return refused(ResponseCode::FormErr);
    };
    let question = Question {
        id: message.id,
        recursion: message.recursion_desired,
        checking_disabled: message.checking_disabled,
        edns: message.edns.as_ref().map(|edns| ClientEdns {
            payload: edns.max_payload(),
            dnssec_ok: edns.flags().dnssec_ok,
        }),
        query: query.clone(),
    };
    if message.edns.is_some_and(|edns| edns.version() != 0) {
        measure::answered(Kind::Other, ResponseCode::BADVERS);
        let reply = Reply::empty(ResponseCode::BADVERS);
        return match reply::encode(&question, &reply, reply::udp_limit(&question)) {
            Some(bytes) => Judged::Refused(bytes),
            None => Judged::Silence,
        };
    }
    Judged::Question(Box::new(question))
}

#[cfg(test)]
pub(crate) mod tests {
    use hickory_proto::op::Edns;
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    use super::*;

    /// A question as a client sends it.
    pub(crate) fn asked(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn code(judged: Judged) -> Option<u8> {
        match judged {
            Judged::Refused(bytes) => {
                assert!(bytes[2] & 0x80 != 0, "an answer");
                Some(bytes[3] & 0x0f)
            }
            Judged::Question(_) => panic!("a question"),
            Judged::Silence => None,
        }
    }

    #[test]
    fn a_question_is_read() {
        let mut message = asked("Web.vm.internal.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_max_payload(4096).set_dnssec_ok(true);
        message.set_edns(edns);
        let Judged::Question(question) = judge(&message.to_vec().unwrap()) else {
            panic!("no question");
        };
        assert_eq!((question.id, question.recursion), (4711, true));
        assert_eq!(question.query.name().to_string(), "Web.vm.internal.");
        let edns = question.edns.unwrap();
        assert_eq!((edns.payload, edns.dnssec_ok), (4096, true));
    }

    #[test]
    fn what_is_no_question_is_refused_or_ignored() {
        let good = asked("web.vm.internal.", RecordType::A).to_vec().unwrap();
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            judge(&bytes)
        };
        assert_eq!(code(judge(&[])), None);
        assert_eq!(code(judge(&good[..11])), None);
        assert_eq!(code(with(&|bytes| bytes[2] |= 0x80)), None, "an answer");
        assert_eq!(code(with(&|bytes| bytes[2] |= 0x28)), Some(4), "an update");
        // Counts that promise what is not there, and would take memory.
        for at in [4, 6, 8, 10] {
            assert_eq!(code(with(&|bytes| bytes[at..at + 2].fill(0xff))), Some(1), "{at}");
        }
        assert_eq!(code(with(&|bytes| bytes[5] = 0)), Some(1), "nothing is asked");
        assert_eq!(code(with(&|bytes| bytes.truncate(20))), Some(1));
        assert_eq!(code(with(&|bytes| bytes.resize(MAX_QUESTION + 1, 0))), Some(1));
        // A name that points to itself.
        assert_eq!(
            code(with(&|bytes| bytes
                .splice(12.., [0xc0, 12, 0, 1, 0, 1])
                .for_each(drop))),
            Some(1)
        );
        let mut versioned = asked("web.vm.internal.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_version(1);
        versioned.set_edns(edns);
        let Judged::Refused(bytes) = judge(&versioned.to_vec().unwrap()) else {
            panic!("EDNS 1 is not known");
        };
        // The number has two names (RFC 6895, 2.3).
        let code = Message::from_vec(&bytes).unwrap().response_code;
        assert_eq!(u16::from(code), u16::from(ResponseCode::BADVERS));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            judge(&bytes);
        }

        #[test]
        fn any_damage_is_judged(at in 0usize..60, byte: u8, cut in 0usize..60) {
            let mut bytes = asked("some.name.vm.internal.", RecordType::AAAA).to_vec().unwrap();
            let length = bytes.len();
            bytes[at % length] = byte;
            bytes.truncate(length - cut % length);
            if let Judged::Refused(answer) = judge(&bytes) {
                // Never more than was sent, and never to an answer.
                prop_assert!(answer.len() <= 12 || answer.len() <= bytes.len() + 11);
                prop_assert!(bytes[2] & 0x80 == 0);
            }
        }
    }
}
