//! Whole VMs with a stock kernel, in the nested rig.

use anyhow::Result;

use crate::report::Outcome;
use crate::rig::{self, Rig};

use super::Context;

pub fn run(context: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let rig = Rig::prepare(packages, Some(context.product()?))?;
    let names = rig::select(&rig.scenarios()?, parts)?;
    rig.run(&names)
}
