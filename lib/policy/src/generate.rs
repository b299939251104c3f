//! What a build script makes of policies.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::bpf::{Denial, Instruction};
use crate::parse::{Action, Policy, Rule};
use crate::{Error, common_folder, load};

/// Compiles all `*.policy` files of `folder` (relative to the package) into
/// `$OUT_DIR/policy.rs`, which `anemone_sandbox::include_policies!` includes. For build scripts:
/// errors end the build with their text.
pub fn compile(folder: impl AsRef<Path>) {
    emit("policy.rs", &[folder.as_ref()], || {
        source(&load_for_build(folder.as_ref())?)
    });
}

/// The policies of a folder as the build that runs this script has them.
fn load_for_build(folder: &Path) -> Result<Vec<Policy>, Error> {
    let mut policies = load(folder)?;
    if std::env::var_os("PROFILE").is_none_or(|profile| profile != "debug") {
        policies = policies.into_iter().map(Policy::released).collect();
    }
    Ok(policies)
}

/// Writes `$OUT_DIR/policies.rs` with the constant `POLICIES`: for each policy of the folders the
/// program's name, the policy's name, the number of system calls it allows and its text with the
/// reasons. For the build script of a program that tells what the others may do.
pub fn describe(folders: &[(&str, &str)]) {
    let paths: Vec<&Path> = folders
        .iter()
        .map(|(_, folder)| Path::new(*folder))
        .collect();
    emit("policies.rs", &paths, || {
        let mut out = String::from(
            "/// The policies of all programs: program, policy, number of system calls, text.\n\
             pub const POLICIES: &[(&str, &str, usize, &str)] = &[\n",
        );
        for (program, folder) in folders {
            for policy in load_for_build(Path::new(folder))? {
                let (name, calls) = (&policy.name, policy.allowed().len());
                let _ = writeln!(
                    out,
                    "({program:?}, {name:?}, {calls}, {:?}),",
                    policy.text()
                );
            }
        }
        out += "];\n";
        Ok(out)
    });
}

/// Runs `make` and writes what it gives to a file of the build's output folder.
fn emit(file: &str, folders: &[&Path], make: impl FnOnce() -> Result<String, Error>) {
    for folder in folders
        .iter()
        .map(|f| f.to_path_buf())
        .chain([common_folder()])
    {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let path = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join(file);
    let written = make().and_then(|text| {
        std::fs::write(&path, text).map_err(|source| Error::File { path, source })
    });
    if let Err(error) = written {
        println!("cargo::error={error}");
        std::process::exit(1);
    }
}

/// The source text of the filters of one program.
pub(crate) fn source(policies: &[Policy]) -> Result<String, Error> {
    let mut out = String::new();
    let gate = common_rules(policies).program(Denial::Notify)?;
    let _ = writeln!(
        out,
        "const GATE: &[::anemone_sandbox::Instruction] = {};",
        literal(&gate)
    );
    for (i, policy) in policies.iter().enumerate() {
        // The number is data of the trap action: 16 bits.
        let index = u16::try_from(i).unwrap_or(u16::MAX);
        let program = policy.program(Denial::Trap(index))?;
        let calls = policy.allowed().len();
        let _ = writeln!(
            out,
            "/// The policy `{}`: {calls} system calls.\n\
             pub const {}: ::anemone_sandbox::Filter = \
             ::anemone_sandbox::Filter::new({:?}, {index}, {}, GATE);",
            policy.name,
            policy.name.to_uppercase().replace('-', "_"),
            policy.name,
            literal(&program),
        );
    }
    Ok(out)
}

fn literal(program: &[Instruction]) -> String {
    let mut out = String::from("&[");
    for i in program {
        let _ = write!(
            out,
            "::anemone_sandbox::instruction({},{},{},{}),",
            i.code, i.jt, i.jf, i.k
        );
    }
    out + "]"
}

/// The rules that all policies have: a call that these allow needs no look at the thread. Under
/// `--sandbox log` only such calls bypass the monitor.
fn common_rules(policies: &[Policy]) -> Policy {
    let Some((first, rest)) = policies.split_first() else {
        return Policy {
            name: "gate".to_owned(),
            rules: Vec::new(),
        };
    };
    let everywhere = |rule: &Rule| {
        rest.iter().all(|p| {
            p.rules.iter().any(|r| {
                (r.syscall, &r.conditions, r.action)
                    == (rule.syscall, &rule.conditions, rule.action)
            })
        })
    };
    let allows = |rule: &Rule| rule.action == Action::Allow;
    let rules = first
        .rules
        .iter()
        .filter(|r| allows(r) && everywhere(r))
        .cloned()
        .collect();
    Policy {
        name: "gate".to_owned(),
        rules,
    }
}
