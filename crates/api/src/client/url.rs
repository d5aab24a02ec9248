//! Request targets: path segments and queries out of what users typed, percent-encoded (RFC 3986, section 2).

use serde::Serialize;
use serde_json::Value;

/// `/v1/vms/{vm}{rest}`, whatever `vm` holds.
pub(super) fn vm(vm: &str, rest: &str) -> String {
    format!("/v1/vms/{}{rest}", encode(vm))
}

/// `path?name=value&…` with the fields of `query` that are set.
pub(super) fn with_query(path: &str, query: &impl Serialize) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(query) else {
        return path.to_owned();
    };
    let pairs: Vec<String> = fields
        .iter()
        .filter_map(|(name, value)| match value {
            Value::Null | Value::Array(_) | Value::Object(_) => None,
            Value::String(text) => Some(format!("{name}={}", encode(text))),
            Value::Bool(_) | Value::Number(_) => Some(format!("{name}={value}")),
        })
        .collect();
    if pairs.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", pairs.join("&"))
    }
}

/// Everything but unreserved characters as `%XX`.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImportQuery;
    use crate::vm::{LogsQuery, StopQuery};

    #[test]
    fn nothing_a_user_types_changes_the_shape_of_the_target() {
        assert_eq!(vm("web", "/start"), "/v1/vms/web/start");
        assert_eq!(
            vm("a/../b?x#y z", "/start"),
            "/v1/vms/a%2F..%2Fb%3Fx%23y%20z/start"
        );
        let query = ImportQuery {
            name: Some("a/b:c&prepare=1é".into()),
            prepare: false,
        };
        assert_eq!(
            with_query("/v1/images/import", &query),
            "/v1/images/import?name=a%2Fb%3Ac%26prepare%3D1%C3%A9&prepare=false"
        );
    }

    #[test]
    fn fields_without_a_value_are_left_out() {
        assert_eq!(with_query("/s", &StopQuery { time_s: None }), "/s");
        assert_eq!(with_query("/s", &StopQuery { time_s: Some(3) }), "/s?time_s=3");
        let logs = LogsQuery {
            tail: Some(5),
            follow: true,
            ..LogsQuery::default()
        };
        assert_eq!(
            with_query("/l", &logs),
            "/l?console=false&follow=true&tail=5&timestamps=false"
        );
    }
}
