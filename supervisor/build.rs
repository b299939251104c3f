//! Compiles the supervisor's own system-call policy, and gives `anemone doctor` those of the
//! programs in this build.

use std::env;

fn main() {
    let mut programs = vec![
        ("anemone".to_owned(), "policy".to_owned()),
        ("anemone-vmm".to_owned(), "../vmm/policy".to_owned()),
    ];
    let devices = std::fs::read_dir("../devices").into_iter().flatten();
    let mut devices: Vec<_> = devices
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    devices.sort();
    for name in devices {
        let feature = format!("CARGO_FEATURE_{}", name.to_uppercase());
        if env::var_os(feature).is_some() {
            programs.push((
                format!("anemone-{name}"),
                format!("../devices/{name}/policy"),
            ));
        }
    }
    let in_build: Vec<_> = programs
        .iter()
        .map(|(program, folder)| (program.as_str(), folder.as_str()))
        .collect();
    anemone_policy::compile("policy");
    anemone_policy::describe(&in_build);
}
