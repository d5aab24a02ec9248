//! What a pretend process does, read from its argument list. Pure.
//!
//! | it is told | it does |
//! | --- | --- |
//! | `true`, `:`, `false` | ends with 0 or 1 |
//! | `echo WORDS [>&2]` | writes them |
//! | `sleep SECONDS`, `sleep infinity` | waits |
//! | `exit N`, `sh -c "SCRIPT"` with `;` and `&&` | as in a shell |
//! | `poweroff`, `halt`, `reboot`, `echo c > /proc/sysrq-trigger` | ends the guest |
//! | a path below `/nonexistent` | cannot be started |
//! | anything else | runs until a signal ends it |

use std::time::Duration;

use offshoot_agent_proto::v1;

use crate::machine::End;

/// Where nothing ever is (hier(7) of Debian: the home of users without one).
const NOWHERE: &str = "/nonexistent";
/// Shells in shells are read this deep.
const MAX_DEPTH: usize = 8;

/// One thing after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It writes.
    Write(v1::Stream, Vec<u8>),
    /// It waits.
    Sleep(Duration),
    /// It waits for a signal.
    Forever,
    /// It ends the guest.
    EndGuest(End),
    /// It ends.
    Exit(i32),
}

/// There is no such program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("exec {path}: no such file or directory")]
pub(crate) struct NotFound {
    path: String,
}

/// What `argv` does; the last step ends it or never ends.
pub(crate) fn steps(argv: &[String]) -> Result<Vec<Step>, NotFound> {
    if let Some(path) = argv.first().filter(|word| word.starts_with(NOWHERE)) {
        return Err(NotFound { path: path.clone() });
    }
    let mut reading = Reading {
        steps: Vec::new(),
        over: false,
    };
    let status = reading.command(argv, 0);
    if !reading.over {
        reading.steps.push(Step::Exit(status));
    }
    Ok(reading.steps)
}

struct Reading {
    steps: Vec<Step>,
    /// Nothing that comes later is reached.
    over: bool,
}

impl Reading {
    fn last(&mut self, step: Step) -> i32 {
        self.steps.push(step);
        self.over = true;
        0
    }

    /// Adds one command; gives its status.
    fn command(&mut self, words: &[String], depth: usize) -> i32 {
        let Some((program, rest)) = words.split_first() else {
            return 0;
        };
        if rest.iter().any(|word| word.ends_with("/proc/sysrq-trigger")) {
            return self.last(Step::EndGuest(End::Panic));
        }
        let name = program.rsplit('/').next().unwrap_or_default();
        match (name, rest) {
            ("true" | ":", _) => 0,
            ("false", _) => 1,
            ("exit", _) => {
                let status = rest.first().and_then(|word| word.parse::<u8>().ok());
                self.last(Step::Exit(status.unwrap_or(0).into()))
            }
            ("echo", _) => {
                let (words, stream) = match rest.split_last() {
                    Some((last, words)) if last == ">&2" => (words, v1::Stream::Stderr),
                    _ => (rest, v1::Stream::Stdout),
                };
                let line = format!("{}\n", words.join(" "));
                self.steps.push(Step::Write(stream, line.into_bytes()));
                0
            }
            ("sleep", [time, ..]) => match seconds(time) {
                Some(time) => {
                    self.steps.push(Step::Sleep(time));
                    0
                }
                None => self.last(Step::Forever),
            },
            ("poweroff" | "halt", _) => self.last(Step::EndGuest(End::PowerOff)),
            ("reboot", _) => self.last(Step::EndGuest(End::Reset)),
            ("exec", [_, ..]) => {
                let status = self.command(rest, depth);
                if self.over {
                    status
                } else {
                    self.last(Step::Exit(status))
                }
            }
            ("sh" | "bash" | "dash", [option, script, ..]) if option == "-c" && depth < MAX_DEPTH => {
                self.script(script, depth + 1)
            }
            _ => self.last(Step::Forever),
        }
    }

    /// Adds a shell's script; gives the status of its last command.
    fn script(&mut self, script: &str, depth: usize) -> i32 {
        let outer = self.steps.len();
        let mut status = 0;
        for (only_after_success, words) in commands(script) {
            if only_after_success && status != 0 {
                continue;
            }
            status = self.command(&words, depth);
            if self.over {
                // The end of an inner shell is not the end of the outer one.
                if let Some(Step::Exit(code)) = self.steps.get(outer..).and_then(<[_]>::last).cloned() {
                    self.steps.pop();
                    self.over = false;
                    return code;
                }
                break;
            }
        }
        status
    }
}

/// What `sleep` waits: a number of seconds; `None` for ever, and for what is no time that ends within a life.
fn seconds(word: &str) -> Option<Duration> {
    word.parse()
        .ok()
        .and_then(|time| Duration::try_from_secs_f64(time).ok())
}

/// The commands of a script, each with whether it follows `&&`, in words without quotes.
fn commands(script: &str) -> Vec<(bool, Vec<String>)> {
    let mut commands = vec![(false, Vec::new())];
    let (mut word, mut in_word, mut quote) = (String::new(), false, None);
    let mut characters = script.chars().chain([';']).peekable();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (Some(open), _) if open == c => quote = None,
            (Some(_), _) => word.push(c),
            (None, '\'' | '"') => (quote, in_word) = (Some(c), true),
            // `2>&1` and `>&2` are words; `&` by itself is a separator like any other.
            (None, '&') if word.ends_with('>') => word.push(c),
            (None, ';' | '&' | '\n' | ' ' | '\t') => {
                if in_word && let Some((_, words)) = commands.last_mut() {
                    words.push(std::mem::take(&mut word));
                }
                in_word = false;
                let and = c == '&' && characters.next_if_eq(&'&').is_some();
                if !matches!(c, ' ' | '\t') {
                    commands.push((and, Vec::new()));
                }
            }
            (None, _) => {
                word.push(c);
                in_word = true;
            }
        }
    }
    commands.retain(|(_, words)| !words.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(text: &str) -> Step {
        Step::Write(v1::Stream::Stdout, text.into())
    }

    #[test]
    fn commands_mean_what_they_mean_elsewhere() {
        let check = |argv: &[&str], expected: &[Step]| {
            let words: Vec<_> = argv.iter().map(ToString::to_string).collect();
            assert_eq!(steps(&words).unwrap(), expected, "{argv:?}");
        };
        check(&["true"], &[Step::Exit(0)]);
        check(&["/bin/false", "x"], &[Step::Exit(1)]);
        check(&["exit", "7"], &[Step::Exit(7)]);
        check(&["echo", "a  b", "c"], &[out("a  b c\n"), Step::Exit(0)]);
        check(
            &["sleep", "0.5"],
            &[Step::Sleep(Duration::from_millis(500)), Step::Exit(0)],
        );
        check(&["sleep", "infinity"], &[Step::Forever]);
        check(&["nginx", "-g", "daemon off;"], &[Step::Forever]);
        check(&["poweroff"], &[Step::EndGuest(End::PowerOff)]);
        check(
            &["sh", "-c", "echo c > /proc/sysrq-trigger"],
            &[Step::EndGuest(End::Panic)],
        );
        check(
            &["sh", "-c", "echo 'a b'; echo \"it's\" >&2; exit 3; echo no"],
            &[
                out("a b\n"),
                Step::Write(v1::Stream::Stderr, b"it's\n".to_vec()),
                Step::Exit(3),
            ],
        );
        check(&["sh", "-c", "false && echo no; true"], &[Step::Exit(0)]);
        check(&["sh", "-c", "false && echo no"], &[Step::Exit(1)]);
        check(
            &["sh", "-c", "sh -c 'exit 4'; echo after"],
            &[out("after\n"), Step::Exit(0)],
        );
        check(
            &["sh", "-c", "echo a; exec sleep infinity"],
            &[out("a\n"), Step::Forever],
        );
        check(
            &["sh", "-c", "while :; do echo $n; sleep 1; done"],
            &[Step::Forever],
        );
        check(&["sh", "-c", ""], &[Step::Exit(0)]);
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        assert!(steps(&["/nonexistent/tool".into()]).is_err());
    }

    #[test]
    fn shells_in_shells_end() {
        let mut script = "exit 5".to_owned();
        for _ in 0..3 {
            script = format!("sh -c \"{}\"", script.replace('"', "'"));
        }
        let words = ["sh".to_owned(), "-c".to_owned(), script];
        assert!(matches!(
            steps(&words).unwrap().last(),
            Some(Step::Exit(_) | Step::Forever)
        ));
    }
}
