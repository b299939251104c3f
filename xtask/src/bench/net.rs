//! `bench net`: `anemone-net` between a driver and a peer that the same client plays. No guest, no
//! network, no privilege.

use anyhow::Result;

use crate::table::{Table, decimal, publish};

use super::client::Client;

/// Measures each load `runs` times for `seconds` each.
pub fn run(runs: usize, seconds: u32) -> Result<()> {
    let client = Client::build("anemone-net", "net-bench", runs, seconds)?;
    let measure = |peer: &str, load: &str, frame: u32| {
        let frame = frame.to_string();
        client.measure(&["--peer", peer, "--load", load, "--frame", &frame])
    };
    let mut flood = Table::new(
        "frames through anemone-net, queue always full (medians); CPU time is its own",
        &[
            "peer",
            "direction",
            "bytes",
            "frames/s",
            "frames per CPU s",
            "CPU ns per frame",
            "in raw round trips",
        ],
    );
    let mut ping = Table::new(
        "one 64-byte frame at a time, to the peer and back (medians), beside two threads that wake each \
         other by eventfds in the same run",
        &[
            "peer",
            "round trip µs",
            "raw µs",
            "ratio",
            "CPU µs per frame",
            "raw CPU µs",
            "added CPU µs",
        ],
    );
    for peer in ["stream", "packets"] {
        for (load, name) in [("tx", "from the guest"), ("rx", "to the guest")] {
            for frame in [64, 1500] {
                let samples = measure(peer, load, frame)?;
                flood.row(vec![
                    peer.into(),
                    name.into(),
                    frame.into(),
                    (samples.median(|s| s.per_second).round() as u64).into(),
                    (samples.median(|s| 1e9 / s.cpu_ns).round() as u64).into(),
                    (samples.median(|s| s.cpu_ns).round() as u64).into(),
                    decimal(samples.median(|s| s.cpu_ns / s.raw_round_trip_ns)),
                ]);
            }
        }
        let mut row = vec![peer.into()];
        row.extend(measure(peer, "ping", 64)?.ping());
        ping.row(row);
    }
    publish("net", &[flood, ping])
}
