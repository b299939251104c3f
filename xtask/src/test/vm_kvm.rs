//! Whole VMs with a stock kernel, in the nested rig.

use anyhow::Result;

use crate::build;
use crate::journal;
use crate::report::Outcome;
use crate::rig::Rig;

use super::Context;

/// Scenarios in which the product has no part.
const WITHOUT_PRODUCT: &[&str] = &["rig", "bare"];

pub fn run(context: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let scenarios = journal::scenarios(&build::guest_runner()?, "kvm")?;
    let names = journal::select(&scenarios, parts)?;
    let product = match names.iter().all(|n| WITHOUT_PRODUCT.contains(&n.as_str())) {
        true => None,
        false => Some(context.product()?),
    };
    Rig::prepare(packages, product)?.run(&names)
}
