//! `bench vsock`: a stream through `anemone-vsock` between a driver and a program of the host that the
//! same client plays. No guest.

use anyhow::Result;

use crate::table::{Table, decimal, publish};

use super::client::Client;

/// Measures each load `runs` times for `seconds` each.
pub fn run(runs: usize, seconds: u32) -> Result<()> {
    let client = Client::build("anemone-vsock", "vsock-bench", runs, seconds)?;
    let mut flow = Table::new(
        "one stream through anemone-vsock, as fast as it goes (medians); CPU time is its own",
        &["direction", "MiB/s", "CPU ns per KiB", "GiB per CPU s"],
    );
    for (load, name) in [("tx", "from the guest"), ("rx", "to the guest")] {
        let samples = client.measure(&["--load", load])?;
        flow.row(vec![
            name.into(),
            (samples
                .median(|s| s.per_second / f64::from(1 << 20))
                .round() as u64)
                .into(),
            decimal(samples.median(|s| s.cpu_ns)),
            decimal(samples.median(|s| 1e9 / s.cpu_ns / f64::from(1 << 20))),
        ]);
    }
    let mut ping = Table::new(
        "64 bytes to the program of the host and back (medians), beside two threads that wake each other \
         by eventfds in the same run",
        &[
            "round trip µs",
            "raw µs",
            "ratio",
            "CPU µs each way",
            "raw CPU µs",
            "added CPU µs",
        ],
    );
    ping.row(client.measure(&["--load", "ping"])?.ping());
    publish("vsock", &[flow, ping])
}
