//! The command line. It uses the library's public interface alone.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::run()
}
