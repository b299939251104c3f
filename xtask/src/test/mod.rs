//! `xtask test`: groups of tests, their verdicts, and the line that sums them up.

mod badinput;
mod bare;
mod compromised;
mod iasl;
mod inject;
mod interop;
mod jail;
mod lint;
mod unit;
mod vm_kvm;
mod vm_soft;

use std::cell::OnceCell;
use std::fmt;

use anyhow::{Result, bail};

use crate::build::{self, Binaries};
use crate::journal;
use crate::packages::{self, Packages};
use crate::report::{Counts, Outcome, Verdict};
use crate::sh;

/// A group: its name, what it shows, and its function. What follows `GROUP:` on the command line
/// selects tests within it, where the group has a choice.
struct Group {
    name: &'static str,
    about: &'static str,
    run: fn(&Context, &[String]) -> Result<Vec<Outcome>>,
}

const GROUPS: &[Group] = &[
    Group {
        name: "lint",
        about: "formatting, clippy without warnings, every build configuration",
        run: lint::run,
    },
    Group {
        name: "unit",
        about: "tests of all packages",
        run: unit::run,
    },
    Group {
        name: "badinput",
        about: "wrong configurations and files: a clear error, exit status 2, nothing left",
        run: badinput::run,
    },
    Group {
        name: "iasl",
        about: "ACPI tables through the reference compiler",
        run: iasl::run,
    },
    Group {
        name: "jail",
        about: "/proc of every process of a running VM; forbidden system calls made in them; \
                jail:ACCELERATOR for one; builds that try them themselves (jail:compromised)",
        run: jail::run,
    },
    Group {
        name: "interop",
        about: "QEMU on our back ends, our VMM on those of others; interop:TEXT for the tests whose \
                names contain it",
        run: interop::run,
    },
    Group {
        name: "vm-soft",
        about: "whole VMs with stock kernels on the software CPU; vm-soft:NAME for one scenario",
        run: vm_soft::run,
    },
    Group {
        name: "bare",
        about: "bare-metal guests on the software CPU; bare:NAME for one; vm-kvm:bare on KVM",
        run: bare::run,
    },
    Group {
        name: "vm-kvm",
        about: "whole VMs with a stock kernel under nested KVM; vm-kvm:NAME for one scenario",
        run: vm_kvm::run,
    },
];

/// Something that a group needs is not on this machine.
#[derive(Debug)]
pub struct Missing(pub String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// What groups share; made when it is first asked for.
#[derive(Default)]
pub struct Context {
    packages: OnceCell<Packages>,
    product: OnceCell<Binaries>,
}

impl Context {
    /// The unpacked Debian packages.
    pub fn packages(&self) -> Result<&Packages> {
        if let Some(packages) = self.packages.get() {
            return Ok(packages);
        }
        let packages = packages::fetch()
            .map_err(|e| Missing(format!("the Debian packages cannot be fetched: {e:#}")))?;
        Ok(self.packages.get_or_init(|| packages))
    }

    /// The release build of everything.
    pub fn product(&self) -> Result<&Binaries> {
        if let Some(product) = self.product.get() {
            return Ok(product);
        }
        let product = build::full()?;
        Ok(self.product.get_or_init(|| product))
    }
}

/// Prints the groups, and the scenarios of whole VMs.
pub fn list() -> Result<()> {
    for group in GROUPS {
        println!("{:<10} {}", group.name, group.about);
    }
    let runner = build::guest_runner()?;
    for (name, about) in vm_soft::scenarios(&runner)? {
        println!("  vm-soft:{name:<16} {about}");
    }
    for (name, about) in journal::scenarios(&runner, "kvm")? {
        println!("  vm-kvm:{name:<16} {about}");
    }
    Ok(())
}

/// Runs groups (all of them if none is named) and prints the counts as the last line. Returns
/// whether everything has passed.
pub fn run(wanted: &[String], allow_missing: &[String]) -> Result<bool> {
    let mut requests: Vec<(&Group, Vec<String>)> = Vec::new();
    for text in wanted {
        let (name, part) = match text.split_once(':') {
            Some((name, part)) => (name, Some(part.to_string())),
            None => (text.as_str(), None),
        };
        let group = find(name)?;
        match requests.iter_mut().find(|(g, _)| g.name == name) {
            Some((_, parts)) => parts.extend(part),
            None => requests.push((group, part.into_iter().collect())),
        }
    }
    if requests.is_empty() {
        requests = GROUPS.iter().map(|group| (group, Vec::new())).collect();
    }
    for name in allow_missing {
        find(name)?;
    }

    let context = Context::default();
    let mut counts = Counts::default();
    let mut failures = Vec::new();
    for (group, parts) in &requests {
        sh::progress(format_args!("group {}: {}", group.name, group.about));
        let outcomes = match (group.run)(&context, parts) {
            Ok(outcomes) => outcomes,
            Err(error)
                if error.is::<Missing>() && allow_missing.iter().any(|n| n == group.name) =>
            {
                sh::progress(format_args!("group {} is skipped: {error:#}", group.name));
                continue;
            }
            Err(error) => vec![Outcome::of("whole group", Err(error))],
        };
        for outcome in &outcomes {
            if let Verdict::Failed(why) = &outcome.verdict {
                failures.push(format!("{}: {}: {why}", group.name, outcome.name));
            }
        }
        let mut own = Counts::default();
        own.add(&outcomes);
        counts.add(&outcomes);
        println!("{}: {own}", group.name);
    }
    for failure in &failures {
        println!("FAILED {failure}");
    }
    println!("{counts}");
    Ok(counts.failed == 0)
}

fn find(name: &str) -> Result<&'static Group> {
    match GROUPS.iter().find(|group| group.name == name) {
        Some(group) => Ok(group),
        None => {
            let known: Vec<_> = GROUPS.iter().map(|g| g.name).collect();
            bail!("no test group {name}; there are {}", known.join(", "))
        }
    }
}
