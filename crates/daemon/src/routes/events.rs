//! `events`: what happened to which VM, from the history and as it happens.
//!
//! Every reader reads the database for itself, a batch whenever its connection takes more: one that is slow or gone holds
//! nobody up and costs no memory.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::stream;
use offshoot_api::event::EventsQuery;
use offshoot_api::progress::NDJSON;
use offshoot_engine::events::EventFollower;
use offshoot_model::Event;
use offshoot_store::db::{DbError, EventFilter};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;
use crate::error::Answer;
use crate::extract::Query;
use crate::time::now_ms;

/// The latest time that the database can hold; a later one means the same.
const LATEST_MS: u64 = i64::MAX.unsigned_abs();
/// How long to sleep before the clock is looked at again: it may have been set meanwhile.
const CLOCK: Duration = Duration::from_secs(10);
/// The fewest digits that are taken for the beginning of an id.
const ID_PREFIX: usize = 3;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(events))
}

#[utoipa::path(get, path = "/v1/events", params(EventsQuery),
    responses((status = 200, content_type = "application/x-ndjson", body = Event),
        (status = "4XX", body = offshoot_api::error::ApiError)))]
async fn events(State(app): State<Shared>, Query(query): Query<EventsQuery>) -> Answer<Response> {
    let span = Span::of(&query, now_ms());
    let log = app.engine.events();
    // Known before the answer begins: who has its head misses nothing from then on.
    let after_seq = match span.begin {
        Begin::Now => log.last().await?,
        Begin::At(_) => 0,
    };
    let filter = EventFilter {
        after_seq,
        since_ms: match span.begin {
            Begin::Now => 0,
            Begin::At(ms) => ms,
        },
        until_ms: match span.end {
            End::Never | End::Now(None) => None,
            End::At(ms) | End::Now(Some(ms)) => Some(ms),
        },
    };
    let reader = Reader {
        follower: log.follow(filter),
        end: span.end,
    };
    let lines = stream::try_unfold((reader, query), |(mut reader, query)| async move {
        while let Some(events) = reader.next().await? {
            let lines = lines(events.iter().filter(|event| is_wanted(event, &query)));
            if !lines.is_empty() {
                return Ok(Some((lines, (reader, query))));
            }
        }
        Ok::<_, DbError>(None)
    });
    Ok(([(CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response())
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// With the next event.
    Now,
    /// With the first one at or after this time.
    At(u64),
}

/// Where to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// When all that is there and happened before this time was read.
    Now(Option<u64>),
    /// When the clock reaches this time.
    At(u64),
    /// When the reader goes away.
    Never,
}

/// What a query asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    begin: Begin,
    end: End,
}

impl Span {
    fn of(query: &EventsQuery, now_ms: u64) -> Self {
        let until = query.until.map(|ms| ms.min(LATEST_MS));
        let end = match until {
            _ if !query.follow => End::Now(until),
            Some(ms) if ms <= now_ms => End::Now(until),
            Some(ms) => End::At(ms),
            None => End::Never,
        };
        let begin = match query.since {
            Some(ms) => Begin::At(ms.min(LATEST_MS)),
            None if matches!(end, End::Now(_)) => Begin::At(0),
            None => Begin::Now,
        };
        Self { begin, end }
    }
}

struct Reader {
    follower: EventFollower,
    end: End,
}

impl Reader {
    /// The next events; `None` at the end.
    async fn next(&mut self) -> Result<Option<Vec<Event>>, DbError> {
        let ready = self.follower.ready().await?;
        if !ready.is_empty() {
            return Ok(Some(ready));
        }
        match self.end {
            End::Now(_) => Ok(None),
            End::Never => self.follower.next().await.map(Some),
            End::At(ms) => {
                tokio::select! {
                    events = self.follower.next() => return events.map(Some),
                    () = wait_for(ms) => {}
                }
                self.end = End::Now(Some(ms));
                let last = self.follower.ready().await?;
                Ok((!last.is_empty()).then_some(last))
            }
        }
    }
}

/// Waits until the clock shows a time, though it may be set.
async fn wait_for(ms: u64) {
    loop {
        let left = Duration::from_millis(ms.saturating_sub(now_ms()));
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(CLOCK)).await;
    }
}

fn is_wanted(event: &Event, query: &EventsQuery) -> bool {
    let named = |word: &str| {
        let name = event.vm_name.as_ref().map_or("", |name| name.as_str());
        let id = event.vm_id.as_ref().map_or("", |id| id.as_str());
        name.eq_ignore_ascii_case(word) || (word.len() >= ID_PREFIX && id.starts_with(word))
    };
    (query.vm.is_empty() || query.vm.iter().any(|word| named(word.as_str())))
        && (query.action.is_empty() || query.action.contains(&event.action))
        && (query.operation.is_none() || query.operation == event.operation)
}

fn lines<'a>(events: impl Iterator<Item = &'a Event>) -> Bytes {
    let mut text = Vec::new();
    for event in events {
        // An event is plain values: there is nothing in it that JSON cannot say.
        text.extend(serde_json::to_vec(event).unwrap_or_default());
        text.push(b'\n');
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::{EventAction, OperationId, VmId};

    #[test]
    fn a_query_says_where_to_begin_and_end() {
        let now = 1000;
        let check = |since, until, follow, begin, end| {
            let query = EventsQuery {
                since,
                until,
                follow,
                ..EventsQuery::default()
            };
            assert_eq!(Span::of(&query, now), Span { begin, end }, "{query:?}");
        };
        check(None, None, false, Begin::At(0), End::Now(None));
        check(None, None, true, Begin::Now, End::Never);
        check(Some(5), None, false, Begin::At(5), End::Now(None));
        check(Some(5), None, true, Begin::At(5), End::Never);
        check(None, Some(2000), true, Begin::Now, End::At(2000));
        check(Some(5), Some(2000), true, Begin::At(5), End::At(2000));
        // What ended already is history, whether it is to be followed or not.
        check(None, Some(1000), true, Begin::At(0), End::Now(Some(1000)));
        check(None, Some(900), false, Begin::At(0), End::Now(Some(900)));
        // Beyond what the database can hold.
        check(Some(u64::MAX), None, false, Begin::At(LATEST_MS), End::Now(None));
        check(Some(0), Some(u64::MAX), true, Begin::At(0), End::At(LATEST_MS));
    }

    #[test]
    fn a_filter_knows_names_ids_actions_and_operations() {
        let event = Event {
            seq: 1,
            time_ms: 1,
            action: EventAction::Start,
            vm_id: Some(VmId::from_bytes(&[0xab; 6])),
            vm_name: Some("web".parse().unwrap()),
            operation: Some(OperationId::from_bytes(&[1; 4])),
            reason: String::new(),
        };
        let check = |vm: &[&str], action: &[EventAction], operation: Option<&str>, wanted| {
            let query = EventsQuery {
                vm: vm.iter().map(|word| word.parse().unwrap()).collect(),
                action: action.to_vec(),
                operation: operation.map(|id| id.parse().unwrap()),
                ..EventsQuery::default()
            };
            assert_eq!(is_wanted(&event, &query), wanted, "{query:?}");
        };
        check(&[], &[], None, true);
        for (word, wanted) in [
            ("web", true),
            ("WEB", true),
            ("we", false),
            ("abababababab", true),
            ("aba", true),
            ("ab", false),
            ("bab", false),
        ] {
            check(&[word], &[], None, wanted);
        }
        check(&["other", "web"], &[], None, true);
        check(&["web"], &[EventAction::Exit], None, false);
        check(&["web"], &[EventAction::Exit, EventAction::Start], None, true);
        check(&[], &[], Some("01010101"), true);
        check(&[], &[], Some("01010102"), false);
        let nobodys = Event {
            vm_id: None,
            vm_name: None,
            operation: None,
            ..event.clone()
        };
        let query = EventsQuery {
            vm: vec!["web".parse().unwrap()],
            ..EventsQuery::default()
        };
        assert!(!is_wanted(&nobodys, &query));
    }

    #[test]
    fn every_event_is_a_line_of_its_own() {
        let event = Event {
            seq: 7,
            time_ms: 1,
            action: EventAction::Repair,
            vm_id: None,
            vm_name: None,
            operation: None,
            reason: "two\nlines".into(),
        };
        let text = lines([&event, &event].into_iter());
        let read: Vec<Event> = text
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(read, [event.clone(), event]);
    }
}
