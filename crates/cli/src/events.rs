//! `events`: what happened to which VM, when and why; live, from the history, or both.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::event::EventsQuery;
use offshoot_model::{Event, EventAction, OperationId, VmName};

use crate::error::Failure;
use crate::output::{Output, OutputArgs, clean, line, now_ms};

#[derive(Clone, Debug, Args)]
pub(crate) struct EventsArgs {
    /// Begin with what happened since then: a length of time such as 10m, or a time (RFC 3339 in UTC, or seconds since
    /// the epoch) [default: from now on]
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// End with what happened before then
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// Show only what fits: `vm=NAME` or an id, `action=WORD`, `operation=ID`. Of several of one kind, one must fit
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = filter)]
    filters: Vec<Filter>,
    /// Show what there is, and do not wait for more; without --since, everything that is kept
    #[arg(long)]
    no_follow: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// A time as users write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// So long ago.
    Ago(Duration),
    /// Milliseconds since the epoch.
    At(u64),
}

impl Moment {
    fn ms(self, now_ms: u64) -> u64 {
        match self {
            Self::Ago(length) => now_ms.saturating_sub(millis(length)),
            Self::At(ms) => ms,
        }
    }
}

fn moment(text: &str) -> Result<Moment, String> {
    if let Ok(seconds) = text.parse::<f64>() {
        // What is no time at all (NaN, infinity, before the epoch) is no duration either.
        return Duration::try_from_secs_f64(seconds)
            .map(|since| Moment::At(millis(since)))
            .map_err(|_| "there is no such time".to_owned());
    }
    if let Ok(length) = humantime::parse_duration(text) {
        return Ok(Moment::Ago(length));
    }
    let day = format!("{text}T00:00:00Z");
    let time = [text, &day]
        .into_iter()
        .find_map(|text| humantime::parse_rfc3339_weak(text).ok());
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map(|since| Moment::At(millis(since))).ok_or_else(|| {
        "write a length of time such as `10m`, or a time in UTC such as `2026-01-31T12:00:00Z`".to_owned()
    })
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// One `--filter`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Filter {
    Vm(VmName),
    Action(EventAction),
    Operation(OperationId),
}

fn filter(text: &str) -> Result<Filter, String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, such as `vm=web`")?;
    match key {
        "vm" => value.parse().map(Filter::Vm).map_err(|error| error.to_string()),
        "operation" | "op" => value
            .parse()
            .map(Filter::Operation)
            .map_err(|error| error.to_string()),
        "action" => {
            let known = EventAction::ALL
                .into_iter()
                .find(|action| action.as_str() == value);
            known.map(Filter::Action).ok_or_else(|| {
                let words: Vec<_> = EventAction::ALL.iter().map(|action| action.as_str()).collect();
                format!("actions are {}", words.join(", "))
            })
        }
        _ => Err("one can filter by `vm`, `action` and `operation`".to_owned()),
    }
}

pub(crate) async fn events(client: &Client, args: &EventsArgs) -> Result<u8, Failure> {
    let mut events = client.events(&query(args, now_ms())?).await?;
    while let Some(event) = events.next().await? {
        line(&match args.output.output {
            Output::Table => sentence(&event),
            Output::Json => serde_json::to_string(&event)
                .map_err(|e| Failure::invalid("cannot write the event as JSON").caused_by(&e))?,
        })?;
    }
    Ok(0)
}

fn query(args: &EventsArgs, now_ms: u64) -> Result<EventsQuery, Failure> {
    let mut query = EventsQuery {
        since: args.since.map(|since| since.ms(now_ms)),
        until: args.until.map(|until| until.ms(now_ms)),
        follow: !args.no_follow,
        ..EventsQuery::default()
    };
    for filter in &args.filters {
        match filter.clone() {
            Filter::Vm(vm) => query.vm.push(vm),
            Filter::Action(action) => query.action.push(action),
            Filter::Operation(id) if query.operation.as_ref().is_none_or(|other| *other == id) => {
                query.operation = Some(id);
            }
            Filter::Operation(_) => {
                return Err(Failure::usage("an event belongs to one operation: filter by one"));
            }
        }
    }
    Ok(query)
}

/// An event in one line: when, what, whose, in which operation, why.
fn sentence(event: &Event) -> String {
    let mut words = vec![stamp(event.time_ms), event.action.to_string()];
    words.extend(event.vm_name.as_ref().map(ToString::to_string));
    words.extend(event.vm_id.as_ref().map(|id| format!("({id})")));
    words.extend(event.operation.as_ref().map(|id| format!("[{id}]")));
    words.push(clean(&event.reason));
    words.join(" ").trim_end().to_owned()
}

/// A time as `logs -t` writes it; in milliseconds where no calendar has it.
fn stamp(ms: u64) -> String {
    let mut text = String::new();
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    match time.map(|time| write!(text, "{}", humantime::format_rfc3339_millis(time))) {
        Some(Ok(())) => text,
        _ => ms.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::VmId;

    #[test]
    fn a_time_is_written_in_many_ways() {
        let minute = Duration::from_secs(60);
        for (text, expected) in [
            ("10m", Moment::Ago(10 * minute)),
            ("1h 30m", Moment::Ago(90 * minute)),
            ("0s", Moment::Ago(Duration::ZERO)),
            ("1970-01-01T00:01:00Z", Moment::At(60_000)),
            ("1970-01-01T00:01:00.5Z", Moment::At(60_500)),
            ("1970-01-01 00:01:00", Moment::At(60_000)),
            ("1970-01-02", Moment::At(86_400_000)),
            ("0", Moment::At(0)),
            ("1136073600.25", Moment::At(1_136_073_600_250)),
        ] {
            assert_eq!(moment(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "yesterday",
            "-1",
            "NaN",
            "inf",
            "1e300",
            "2026-13-01",
            "12:00",
            "1960-01-01",
        ] {
            assert!(moment(bad).is_err(), "{bad}");
        }
        assert_eq!(Moment::Ago(minute).ms(100_000), 40_000);
        assert_eq!(Moment::Ago(minute).ms(1), 0);
    }

    #[test]
    fn filters_become_a_query() {
        let args = |filters: &[&str]| EventsArgs {
            since: Some(Moment::Ago(Duration::from_secs(1))),
            until: None,
            filters: filters.iter().map(|text| filter(text).unwrap()).collect(),
            no_follow: false,
            output: OutputArgs {
                output: Output::Table,
            },
        };
        let asked = query(
            &args(&[
                "vm=web",
                "action=exit",
                "vm=0a1b",
                "action=start-failed",
                "op=0a1b2c3d",
            ]),
            5000,
        )
        .unwrap();
        assert_eq!((asked.since, asked.until, asked.follow), (Some(4000), None, true));
        assert_eq!(
            asked.vm.iter().map(VmName::as_str).collect::<Vec<_>>(),
            ["web", "0a1b"]
        );
        assert_eq!(asked.action, [EventAction::Exit, EventAction::StartFailed]);
        assert_eq!(asked.operation.unwrap().as_str(), "0a1b2c3d");
        assert!(query(&args(&["operation=0a1b2c3d", "operation=0a1b2c3e"]), 0).is_err());
        for bad in [
            "web",
            "vm=",
            "vm=../x",
            "action=explode",
            "operation=1",
            "image=x",
            "=",
            "",
        ] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let mut event = Event {
            seq: 7,
            time_ms: 1_767_323_045_006,
            action: EventAction::Exit,
            vm_id: Some(VmId::from_bytes(&[0xab; 6])),
            vm_name: Some("web".parse().unwrap()),
            operation: Some(OperationId::from_bytes(&[1; 4])),
            reason: "its VMM died, status 255; \u{1b}[2Jout of memory\n".into(),
        };
        insta::assert_snapshot!(sentence(&event), @r"2026-01-02T03:04:05.006Z exit web (abababababab) [01010101] its VMM died, status 255; \u{1b}[2Jout of memory\n");
        event.reason.clear();
        event.action = EventAction::StartFailed;
        event.operation = None;
        insta::assert_snapshot!(sentence(&event), @"2026-01-02T03:04:05.006Z start-failed web (abababababab)");
        event.vm_id = None;
        event.vm_name = None;
        event.action = EventAction::Repair;
        event.reason = "removed the mount /x".into();
        event.time_ms = 0;
        insta::assert_snapshot!(sentence(&event), @"1970-01-01T00:00:00.000Z repair removed the mount /x");
        event.time_ms = u64::MAX;
        assert!(sentence(&event).starts_with("18446744073709551615 repair"));
    }
}
