//! Long runs of the differential test: `--cases N` in all, `--seed S`, on two threads;
//! `--list` names every form claimed.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (mut cases, mut seed) = (1_000_000, 1);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--list" {
            let (thunks, integers) = harness::claims(&mut harness::Summary::default());
            thunks.iter().for_each(|code| println!("thunk {code:?}"));
            integers
                .iter()
                .for_each(|code| println!("primitive {code:?}"));
            return ExitCode::SUCCESS;
        }
        let value = arguments.next().and_then(|text| text.parse::<u64>().ok());
        match (name.as_str(), value) {
            ("--cases", Some(value)) => cases = value,
            ("--seed", Some(value)) => seed = value,
            _ => {
                eprintln!("usage: differential [--cases N] [--seed S] | --list");
                return ExitCode::from(2);
            }
        }
    }
    match harness::alignment(seed) {
        Ok(checked) => println!("alignment of {checked} forms as the host enforces it"),
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::FAILURE;
        }
    }
    let seeds = [2 * seed, 2 * seed + 1];
    let threads =
        seeds.map(|seed| std::thread::spawn(move || harness::run(seed, cases.div_ceil(2))));
    let mut failed = false;
    for thread in threads {
        match thread.join() {
            Ok(Ok(summary)) => println!("{summary:#?}"),
            Ok(Err(text)) => {
                eprintln!("{text}");
                failed = true;
            }
            Err(_) => failed = true,
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
