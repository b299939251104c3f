//! `bench start`: from exec to the first guest instruction, and the CPU time of each process
//! until then.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail;
use anyhow::{Result, bail};

use crate::table::{Table, decimal, publish};
use crate::{build, packages, sh};

use super::trace::Trace;
use super::vmm::{Vmm, others, ours};
use super::{median, quantile};

/// How long a VM is left alone before it is looked at: the guest has halted by then, and looking
/// would disturb its start.
const SETTLE: Duration = Duration::from_millis(150);

#[derive(Default)]
struct Samples {
    first_run: Vec<f64>,
    first_effect: Vec<f64>,
    /// CPU milliseconds by program.
    cpu: BTreeMap<String, Vec<f64>>,
}

/// Measures every VMM `runs` times, taking turns.
pub fn run(runs: usize) -> Result<()> {
    let packages = packages::fetch()?;
    let product = build::full()?;
    let mut vmms = Vec::new();
    for devices in [0, 1, 3] {
        vmms.push(ours(&product, devices, 0)?);
    }
    vmms.extend(others(&packages)?);
    let trace = Trace::new()?;
    let mut samples: Vec<Samples> = vmms.iter().map(|_| Samples::default()).collect();
    for round in 0..=runs {
        if round % 10 == 0 {
            sh::progress(format_args!("round {round} of {runs}"));
        }
        for (vmm, samples) in vmms.iter().zip(&mut samples) {
            let mut warm_up = Samples::default();
            // The first round fills the page cache.
            let target = if round == 0 { &mut warm_up } else { samples };
            measure(&trace, vmm, target)?;
        }
    }

    let mut wall = Table::new(
        "Milliseconds from exec to the first KVM_RUN, and until the guest's first instruction was \
         seen",
        &["VMM", "median", "p10", "p90", "effect", "of microvm"],
    );
    let microvm = vmms
        .iter()
        .position(|v| v.name == "QEMU microvm")
        .map_or(0.0, |i| median(&samples[i].first_run));
    let mut cpu = Table::new(
        "CPU milliseconds per process, start to idle (median)",
        &["VMM", "process", "CPU ms"],
    );
    for (vmm, samples) in vmms.iter().zip(&samples) {
        wall.row(vec![
            vmm.name.clone().into(),
            decimal(median(&samples.first_run)),
            decimal(quantile(&samples.first_run, 0.1)),
            decimal(quantile(&samples.first_run, 0.9)),
            decimal(median(&samples.first_effect)),
            decimal(median(&samples.first_run) / microvm),
        ]);
        for (program, values) in &samples.cpu {
            cpu.row(vec![
                vmm.name.clone().into(),
                program.clone().into(),
                decimal(median(values)),
            ]);
        }
    }
    publish("start", &[wall, cpu])
}

fn measure(trace: &Trace, vmm: &Vmm, samples: &mut Samples) -> Result<()> {
    trace.clear()?;
    let mut child = vmm.spawn()?;
    let end = Instant::now() + Duration::from_secs(10);
    let times = loop {
        thread::sleep(SETTLE);
        if let Some(times) = trace.times()? {
            break times;
        }
        if let Some(status) = child.0.try_wait()? {
            bail!("{} ended before its guest ran: {status}", vmm.name);
        }
        if Instant::now() > end {
            bail!("{}: no KVM_RUN within 10 s", vmm.name);
        }
    };
    for process in jail::family(child.0.id()) {
        let millis = cpu_millis(process.pid).unwrap_or(0.0);
        samples
            .cpu
            .entry(vmm.label(&process))
            .or_default()
            .push(millis);
    }
    samples.first_run.push(times.first_run);
    samples.first_effect.extend(times.first_effect);
    drop(child);
    Ok(())
}

/// CPU time of a process with all threads, living and ended.
pub(super) fn cpu_millis(pid: u32) -> Option<f64> {
    let mut clock = 0;
    // SAFETY: the pointer is to a live clock id.
    if unsafe { libc::clock_getcpuclockid(pid as i32, &raw mut clock) } != 0 {
        return None;
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a live timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cpu_time_is_readable() {
        assert!(cpu_millis(std::process::id()).unwrap() > 0.0);
    }
}
