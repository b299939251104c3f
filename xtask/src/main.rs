//! Everything around the product: demonstration, tests, benchmarks, builds and figures.
//! `cargo xtask help` lists the commands; docs/testing.md explains the tests.

mod build;
mod cpio;
mod disk;
mod initramfs;
mod modules;
mod packages;
mod report;
mod rig;
mod sh;

use std::process::ExitCode;

fn main() -> ExitCode {
    match try_it() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
fn try_it() -> anyhow::Result<()> {
    let p = packages::fetch()?;
    let rig = rig::Rig::prepare(&p, None)?;
    let names: Vec<String> = std::env::args().skip(1).collect();
    let names = rig::select(&rig.scenarios()?, &names)?;
    for o in rig.run(&names)? {
        println!("{o:?}");
    }
    Ok(())
}
