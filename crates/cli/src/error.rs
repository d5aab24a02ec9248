//! What a command fails with, and the one place that prints it.
//!
//! ```text
//! error: cannot start VM `web`
//!   caused by: cannot open /dev/kvm
//! hint: add your user to the group `kvm`, or run `offshoot doctor`
//! ```

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use offshoot_api::channel::Status;
use offshoot_api::client::ClientError;
use offshoot_api::error::ApiError;
use offshoot_model::{ErrorKind, Explain};

use crate::output::clean;

/// Exit status of every error that has no status of its own.
pub(crate) const ERROR: u8 = 1;
/// Exit status of a command that was written wrongly, as clap has it.
const USAGE: u8 = 2;
/// Exit status when nobody listens at the socket.
pub(crate) const UNREACHABLE: u8 = 3;
/// Exit status after Ctrl-C: 128 and SIGINT, as a shell counts it.
const CANCELLED: u8 = 130;
/// Exit status when nobody reads the output any more: 128 and SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// Why a command ends with another status than it should.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What to print; nothing when everything was said already.
    error: Option<ApiError>,
    status: u8,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            error: Some(ApiError::new(kind, message)),
            status: ERROR,
        }
    }

    /// A wrong use of files or options that clap cannot see.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidRequest, message)
    }

    /// What a value of ours says of itself, such as a name that is none.
    pub(crate) fn explained(error: &dyn Explain) -> Self {
        Self {
            error: Some(ApiError::from_explained(error)),
            status: ERROR,
        }
    }

    /// A command that cannot be used so, as if clap had refused it.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            status: USAGE,
            ..Self::invalid(message)
        }
    }

    /// Something that the daemon could not do while it did the rest.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The operating system refused something.
    pub(crate) fn io(message: impl Into<String>, cause: &io::Error) -> Self {
        Self::new(ErrorKind::Internal, message).caused_by(cause)
    }

    /// Writing a result failed; without a word when the reader went away.
    pub(crate) fn write(cause: &io::Error) -> Self {
        if cause.kind() == io::ErrorKind::BrokenPipe {
            return Self {
                error: None,
                status: BROKEN_PIPE,
            };
        }
        Self::io("cannot write the output", cause)
    }

    /// Ctrl-C before there was anything to signal.
    pub(crate) fn cancelled() -> Self {
        Self {
            error: None,
            status: CANCELLED,
        }
    }

    #[must_use]
    pub(crate) fn caused_by(mut self, cause: &dyn std::error::Error) -> Self {
        if let Some(error) = &mut self.error {
            let mut next = Some(cause);
            while let Some(cause) = next {
                error.causes.push(cause.to_string());
                next = cause.source();
            }
        }
        self
    }

    /// Adds a cause that is known by its words alone.
    #[must_use]
    pub(crate) fn because(mut self, cause: impl Into<String>) -> Self {
        if let Some(error) = &mut self.error {
            error.causes.push(cause.into());
        }
        self
    }

    /// The message and its causes in one line.
    pub(crate) fn told(&self) -> String {
        let Some(error) = &self.error else {
            return String::new();
        };
        let mut told = error.message.clone();
        for cause in &error.causes {
            told.push_str(": ");
            told.push_str(cause);
        }
        told
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.error = self.error.map(|error| error.hint(hint));
        self
    }

    /// Prints it and gives the exit status.
    pub(crate) fn report(self) -> ExitCode {
        if let Some(error) = &self.error {
            // Nothing is left to do when standard error is closed.
            let _ = io::stderr().write_all(render(error).as_bytes());
        }
        ExitCode::from(self.status)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::Unreachable { .. } => UNREACHABLE,
            ClientError::Api(error) => command_status(error.exit_status.unwrap_or(0)),
            ClientError::Protocol { .. } => ERROR,
        };
        Self {
            error: Some(error.to_api()),
            status,
        }
    }
}

/// The exit status that a session's end asks for; a process that did not start is an error to print.
pub(crate) fn status_code(status: Status) -> Result<u8, Failure> {
    match status {
        Status::Exited { code } => Ok(low_byte(code)),
        Status::Failed { code, error } => Err(Failure {
            error: Some(error),
            status: command_status(code),
        }),
    }
}

/// What to end with when a process has no status of its own: 126 and 127 tell why it could not be started, as in a
/// shell, and 137 that its VM went away. 125, a session that broke, is an error like any other.
fn command_status(code: i32) -> u8 {
    if matches!(code, 126..=255) {
        low_byte(code)
    } else {
        ERROR
    }
}

/// What a parent sees of an exit status.
pub(crate) fn low_byte(code: i32) -> u8 {
    code.to_le_bytes()[0]
}

/// Prints an error of one thing among several, and goes on.
pub(crate) fn report_and_go_on(failure: Failure) {
    let _ = failure.report();
}

fn render(error: &ApiError) -> String {
    let mut text = format!("error: {}\n", clean(&error.message));
    for cause in &error.causes {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  caused by: {}", clean_lines(cause));
    }
    for hint in &error.hints {
        let _ = writeln!(text, "hint: {}", clean(hint));
    }
    if let Some(operation) = &error.operation
        && is_worth_a_look(error.kind)
    {
        let _ = writeln!(text, "operation: {} (in the daemon's log)", clean(operation));
    }
    text
}

/// The last words of a program are lines; none of them may pass for a line of ours.
fn clean_lines(text: &str) -> String {
    let lines: Vec<_> = text.split('\n').map(clean).collect();
    lines.join("\n    ")
}

/// Whether the daemon's log may say more: what a user asked for wrongly is said in full by the error itself.
fn is_worth_a_look(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::InvalidRequest
        | ErrorKind::NotFound
        | ErrorKind::Conflict
        | ErrorKind::WrongState
        | ErrorKind::Cancelled => false,
        ErrorKind::NotPossible
        | ErrorKind::BadContent
        | ErrorKind::NoSpace
        | ErrorKind::Upstream
        | ErrorKind::Internal => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_printed_with_causes_and_hints() {
        let failure = Failure::invalid("cannot start VM `web`")
            .caused_by(&io::Error::other("permission denied"))
            .hint("add your user to the group `kvm`, or run `offshoot doctor`");
        insta::assert_snapshot!(render(&failure.error.unwrap()), @r"
        error: cannot start VM `web`
          caused by: permission denied
        hint: add your user to the group `kvm`, or run `offshoot doctor`
        ");
    }

    #[test]
    fn lines_of_a_cause_stay_below_it() {
        let failure = Failure::invalid("cannot compile a kernel")
            .caused_by(&io::Error::other("make failed:\nhint: \u{1b}[2Ja.c:1: boom"));
        insta::assert_snapshot!(render(&failure.error.unwrap()), @r"
        error: cannot compile a kernel
          caused by: make failed:
            hint: \u{1b}[2Ja.c:1: boom
        ");
    }

    #[test]
    fn the_operation_is_named_where_the_log_says_more() {
        let mut error = ApiError::new(ErrorKind::Internal, "cannot start VM `web`");
        error.operation = Some("1a2b3c4d".into());
        insta::assert_snapshot!(render(&error), @r"
        error: cannot start VM `web`
        operation: 1a2b3c4d (in the daemon's log)
        ");
        error.kind = ErrorKind::NotFound;
        assert_eq!(render(&error), "error: cannot start VM `web`\n");
    }

    #[test]
    fn an_error_cannot_steer_the_terminal() {
        let text = render(&ApiError::new(ErrorKind::Upstream, "evil \u{1b}[2J\nerror: fake"));
        assert_eq!(text, "error: evil \\u{1b}[2J\\nerror: fake\n");
    }

    #[test]
    fn sessions_end_with_the_status_of_their_process() {
        let failed = |code| Status::Failed {
            code,
            error: ApiError::new(ErrorKind::NotFound, "no such program"),
        };
        assert_eq!(status_code(Status::Exited { code: 7 }).unwrap(), 7);
        assert_eq!(status_code(Status::Exited { code: 256 + 9 }).unwrap(), 9);
        for (code, expected) in [(127, 127), (126, 126), (137, 137), (256, 1), (125, 1), (0, 1)] {
            assert_eq!(status_code(failed(code)).unwrap_err().status, expected);
        }
    }

    #[test]
    fn only_an_unreachable_daemon_has_status_3() {
        let unreachable = ClientError::Unreachable {
            socket: "/x".into(),
            group: None,
            source: io::Error::from(io::ErrorKind::NotFound),
        };
        assert_eq!(Failure::from(unreachable).status, 3);
        let mut api = ApiError::new(ErrorKind::NotFound, "no");
        assert_eq!(Failure::from(ClientError::Api(api.clone())).status, 1);
        api.exit_status = Some(127);
        assert_eq!(Failure::from(ClientError::Api(api)).status, 127);
        assert_eq!(
            Failure::write(&io::Error::from(io::ErrorKind::BrokenPipe)).status,
            141
        );
    }
}
