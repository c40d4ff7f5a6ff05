//! Every service in one process, and the command line.

fn main() -> std::process::ExitCode {
    aeterna::cli::run()
}
