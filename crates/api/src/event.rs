//! The history over the wire: [`offshoot_model::Event`]s, one JSON object a line, and which of them to send.

use offshoot_model::{EventAction, OperationId, VmName};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

/// Query of `GET /v1/events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct EventsQuery {
    /// Only what happened at or after this time, milliseconds since the epoch. Without it, everything that is kept; when
    /// following, only what happens from now on.
    pub since: Option<u64>,
    /// Only what happened before this time, milliseconds since the epoch. The answer ends when it is reached.
    pub until: Option<u64>,
    /// Go on with what happens next. What would end in the past is not followed.
    pub follow: bool,
    /// Only what happened to these VMs: their names at that time, their ids, or the first digits of their ids (three at
    /// least), with commas between them.
    #[serde(with = "comma", skip_serializing_if = "Vec::is_empty")]
    #[param(value_type = Vec<String>, style = Form, explode = false)]
    pub vm: Vec<VmName>,
    /// Only these actions, with commas between them.
    #[serde(with = "comma", skip_serializing_if = "Vec::is_empty")]
    #[param(value_type = Vec<EventAction>, style = Form, explode = false)]
    pub action: Vec<EventAction>,
    /// Only what this operation did: the id that errors, the log and the header `x-offshoot-operation` name.
    #[param(value_type = Option<String>)]
    pub operation: Option<OperationId>,
}

/// Several words in one parameter, with commas between them. None of the words has one.
mod comma {
    use serde::de::{DeserializeOwned, Error as _};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};
    use serde_json::Value;

    pub(super) fn serialize<T: Serialize, S: Serializer>(words: &[T], to: S) -> Result<S::Ok, S::Error> {
        let mut texts = Vec::with_capacity(words.len());
        for word in words {
            match serde_json::to_value(word) {
                Ok(Value::String(text)) => texts.push(text),
                _ => return Err(ser::Error::custom("a list in a query holds words")),
            }
        }
        to.serialize_str(&texts.join(","))
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<Vec<T>, D::Error>
    where
        T: DeserializeOwned,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(from)?;
        text.split(',')
            .filter(|word| !word.is_empty())
            .map(|word| serde_json::from_value(Value::String(word.to_owned())).map_err(D::Error::custom))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_comes_back_as_it_was() {
        let query = EventsQuery {
            since: Some(5),
            until: None,
            follow: true,
            vm: vec!["web".parse().unwrap(), "0a1b2c".parse().unwrap()],
            action: vec![EventAction::StartFailed, EventAction::Exit],
            operation: Some("1a2b3c4d".parse().unwrap()),
        };
        let value = serde_json::to_value(&query).unwrap();
        assert_eq!(value["vm"], "web,0a1b2c");
        assert_eq!(value["action"], "start-failed,exit");
        assert_eq!(serde_json::from_value::<EventsQuery>(value).unwrap(), query);
        let empty = serde_json::to_value(EventsQuery::default()).unwrap();
        assert_eq!(empty.get("vm"), None);
        assert_eq!(
            serde_json::from_value::<EventsQuery>(empty).unwrap(),
            EventsQuery::default()
        );
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        for bad in [
            serde_json::json!({"action": "exit,explode"}),
            serde_json::json!({"vm": "../x"}),
            serde_json::json!({"vm": "-x"}),
            serde_json::json!({"operation": "xyz"}),
            serde_json::json!({"since": "-1"}),
        ] {
            assert!(
                serde_json::from_value::<EventsQuery>(bad.clone()).is_err(),
                "{bad}"
            );
        }
    }
}
