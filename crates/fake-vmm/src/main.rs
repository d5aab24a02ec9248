//! The fake VMM as a program: see `offshoot_fake_vmm`. It is started with QEMU's arguments by QEMU's driver.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use offshoot_fake_vmm::{Arguments, Behaviour, answer_to_question, run};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(answer) = answer_to_question(&args) {
        return match std::io::stdout().write_all(answer.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let behaviour = std::env::var(Behaviour::VARIABLE).unwrap_or_default();
    let behaviour: Behaviour = match behaviour.parse() {
        Ok(behaviour) => behaviour,
        Err(error) => return complain(&error.to_string()),
    };
    let arguments = match Arguments::read(&args) {
        Ok(arguments) => arguments,
        Err(error) => return complain(&error.to_string()),
    };
    if behaviour.exit {
        return complain("told to exit at start");
    }
    if let Err(error) = std::fs::File::open(&arguments.kernel) {
        return complain(&format!(
            "could not open kernel file '{}': {error}",
            arguments.kernel.display()
        ));
    }
    match run(arguments, &behaviour) {
        Ok(status) => u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => complain(&error.to_string()),
    }
}

/// One line on standard error, as QEMU does it.
fn complain(words: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "offshoot-fake-vmm: {words}");
    ExitCode::FAILURE
}
