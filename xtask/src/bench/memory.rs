//! `bench memory`: what the processes of an idle VM hold, without the guest's memory.

use std::fs;
use std::ops::AddAssign;
use std::thread;
use std::time::Duration;

use anemone_guest_init::jail;
use anyhow::{Context, Result, bail, ensure};

use crate::table::{Table, decimal, publish};
use crate::{build, packages, sh};

use super::vmm::{MEMORY_MIB, Vmm, others, ours};

/// Time after which a VM of this kind does nothing any more.
const SETTLE: Duration = Duration::from_secs(1);
/// VMs at once, for the cost of one more.
const MANY: usize = 8;

/// Memory in KiB: resident, proportional, private, and private and written to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Resident set.
    pub rss: u64,
    /// Proportional share of shared pages.
    pub pss: u64,
    /// Pages that only this process has.
    pub uss: u64,
    /// Those of them that no file can give back.
    pub dirty: u64,
}

impl AddAssign for Use {
    fn add_assign(&mut self, other: Self) {
        self.rss += other.rss;
        self.pss += other.pss;
        self.uss += other.uss;
        self.dirty += other.dirty;
    }
}

/// Every process from `pid` downwards with its memory, without mappings that hold guest memory of
/// `guest_mib`.
pub fn of_family(pid: u32, guest_mib: u32) -> Result<Vec<(jail::Process, Use)>> {
    jail::family(pid)
        .into_iter()
        .map(|process| {
            let path = format!("/proc/{}/smaps", process.pid);
            let smaps = fs::read_to_string(&path)
                .with_context(|| format!("{path}: memory is read by root"))?;
            Ok((process, sum(&smaps, guest_mib)))
        })
        .collect()
}

/// Adds up smaps (proc(5)). A mapping holds guest memory if it is at least as large as that: no
/// VMM maps anything else of the kind, neither as a memfd nor as anonymous memory.
fn sum(smaps: &str, guest_mib: u32) -> Use {
    let guest_kib = u64::from(guest_mib) * 1024;
    let mut total = Use::default();
    let mut guest = false;
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib: u64 = value.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        match key {
            "Size" => guest = kib >= guest_kib,
            _ if guest => {}
            "Rss" => total.rss += kib,
            "Pss" => total.pss += kib,
            "Private_Clean" => total.uss += kib,
            "Private_Dirty" => {
                total.uss += kib;
                total.dirty += kib;
            }
            _ => {}
        }
    }
    total
}

/// Measures our VMs with 0, 1 and 3 devices, one and eight of them, and the others.
pub fn run() -> Result<()> {
    ensure!(
        sh::is_root(),
        "bench memory reads the memory maps of jailed processes: be root"
    );
    let packages = packages::fetch()?;
    let product = build::full()?;
    let mut processes = Table::new(
        "KiB per process of an idle 512 MiB VM, guest memory excluded",
        &["VMM", "process", "RSS", "PSS", "USS", "of it dirty"],
    );
    let mut sums = Table::new(
        "MiB per VM, guest memory excluded; marginal: one more VM, of eight",
        &["VMM", "PSS", "USS", "marginal PSS"],
    );
    for devices in [0, 1, 3] {
        let vmms = (0..MANY)
            .map(|i| ours(&product, devices, i))
            .collect::<Result<Vec<_>>>()?;
        measure(&vmms.iter().collect::<Vec<_>>(), &mut processes, &mut sums)?;
    }
    for vmm in others(&packages)? {
        measure(&[&vmm; MANY], &mut processes, &mut sums)?;
    }
    publish("memory", &[processes, sums])
}

fn measure(vmms: &[&Vmm], processes: &mut Table, sums: &mut Table) -> Result<()> {
    let Some(first) = vmms.first() else {
        return Ok(());
    };
    sh::progress(format_args!("memory of {}", first.name));
    let mut children = vec![first.spawn()?];
    thread::sleep(SETTLE);
    let mut one = Use::default();
    for (process, used) in of_family(children[0].0.id(), MEMORY_MIB)? {
        one += used;
        processes.row(vec![
            first.name.clone().into(),
            first.label(&process).into(),
            used.rss.into(),
            used.pss.into(),
            used.uss.into(),
            used.dirty.into(),
        ]);
    }
    for vmm in &vmms[1..] {
        children.push(vmm.spawn()?);
    }
    thread::sleep(SETTLE);
    let mut all = Use::default();
    for child in &mut children {
        if let Some(status) = child.0.try_wait()? {
            bail!("{} has ended: {status}", first.name);
        }
        for (_, used) in of_family(child.0.id(), MEMORY_MIB)? {
            all += used;
        }
    }
    let marginal = all.pss.saturating_sub(one.pss) as f64 / (vmms.len() - 1).max(1) as f64;
    sums.row(vec![
        first.name.clone().into(),
        decimal(one.pss as f64 / 1024.0),
        decimal(one.uss as f64 / 1024.0),
        decimal(marginal / 1024.0),
    ]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 3 /memfd:memory (deleted)
Size:             524288 kB
Rss:              100000 kB
Pss:              100000 kB
Private_Dirty:    100000 kB
55d000000000-55d000010000 r-xp 00000000 08:01 9 /usr/bin/anemone-vmm
Size:                 64 kB
Rss:                  40 kB
Pss:                  10 kB
Pss_Dirty:             1 kB
Private_Clean:         4 kB
Private_Dirty:         2 kB
";
        let expected = Use {
            rss: 40,
            pss: 10,
            uss: 6,
            dirty: 2,
        };
        assert_eq!(sum(smaps, 512), expected);
    }
}
