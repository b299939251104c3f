//! The `anemone` program.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    anemone::main()
}
