//! `logs`: what a VM's main process wrote, each stream to its own.

use std::io::{self, Write};

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::log_frame::LogStream;
use offshoot_api::vm::LogsQuery;

use crate::error::Failure;
use crate::values::vm_ref;

#[derive(Clone, Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on until the VM stops
    #[arg(short, long)]
    follow: bool,
    /// Only so many lines from the end
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = tail)]
    tail: Tail,
    /// Show the time of every line
    #[arg(short, long)]
    timestamps: bool,
    /// Show the guest's console instead
    #[arg(long)]
    console: bool,
    /// Name or id
    #[arg(value_parser = vm_ref)]
    vm: String,
}

/// How much from the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tail(Option<u64>);

fn tail(text: &str) -> Result<Tail, String> {
    if text == "all" {
        return Ok(Tail(None));
    }
    text.parse()
        .map(|lines| Tail(Some(lines)))
        .map_err(|_| "write a number of lines, or `all`".to_owned())
}

pub(crate) async fn logs(client: &Client, args: &LogsArgs) -> Result<u8, Failure> {
    let query = LogsQuery {
        follow: args.follow,
        tail: args.tail.0,
        timestamps: args.timestamps,
        console: args.console,
    };
    let mut logs = client.logs(&args.vm, &query).await?;
    while let Some((stream, data)) = logs.next().await? {
        // Nothing else is going on in this program, so writing may block.
        let written = match stream {
            LogStream::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&data).and_then(|()| stdout.flush())
            }
            LogStream::Stderr => io::stderr().write_all(&data),
        };
        written.map_err(|e| Failure::write(&e))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_a_number_or_all() {
        for (text, expected) in [
            ("all", Ok(Tail(None))),
            ("0", Ok(Tail(Some(0)))),
            ("20", Ok(Tail(Some(20)))),
        ] {
            assert_eq!(tail(text), expected);
        }
        for bad in ["", "-1", "x", "1.5"] {
            assert!(tail(bad).is_err(), "{bad}");
        }
    }
}
