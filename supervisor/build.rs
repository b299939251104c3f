//! Compiles the supervisor's own system-call policy, and gives `anemone doctor` those of the
//! programs in this build.

use std::env;

fn main() {
    let programs = [
        (None, "anemone", "policy"),
        (None, "anemone-vmm", "../vmm/policy"),
        (Some("BLK"), "anemone-blk", "../devices/blk/policy"),
        (
            Some("CONSOLE"),
            "anemone-console",
            "../devices/console/policy",
        ),
        (Some("RNG"), "anemone-rng", "../devices/rng/policy"),
        (Some("VSOCK"), "anemone-vsock", "../devices/vsock/policy"),
    ];
    let in_build: Vec<_> = programs
        .into_iter()
        .filter(|(feature, _, _)| {
            feature.is_none_or(|name| env::var_os(format!("CARGO_FEATURE_{name}")).is_some())
        })
        .map(|(_, program, folder)| (program, folder))
        .collect();
    anemone_policy::compile("policy");
    anemone_policy::describe(&in_build);
}
