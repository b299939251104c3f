//! The policies of this repository.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use anemone_policy::{Action, Denial, Policy, load, syscall_name};
use anemone_sandbox::{Call, Instruction, evaluate, instruction};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn folder(program: &str) -> PathBuf {
    root().join(program).join("policy")
}

/// The packages with policies.
fn programs() -> Vec<String> {
    let devices = std::fs::read_dir(root().join("devices")).unwrap();
    let devices = devices.map(|entry| entry.unwrap().file_name());
    let mut programs: Vec<_> = devices
        .map(|name| format!("devices/{}", name.to_str().unwrap()))
        .filter(|program| folder(program).is_dir())
        .collect();
    programs.push("vmm".to_owned());
    programs.sort();
    programs
}

/// The policies of all released programs but the supervisor.
fn policies() -> Vec<(String, Vec<Policy>)> {
    let of = |program: &str| {
        let policies = load(&folder(program)).unwrap_or_else(|e| panic!("{e}"));
        policies.into_iter().map(Policy::released).collect()
    };
    let programs = programs().into_iter();
    programs
        .map(|program| (program.clone(), of(&program)))
        .collect()
}

/// The most system calls that a policy may allow; more is a decision.
#[test]
fn policies_are_narrow() {
    const MOST: usize = 30;
    const OTHERS: &[(&str, &str, usize)] = &[
        ("vmm", "vcpu", 12),
        // Most of them are one operation of virtio-fs each: docs/file-sharing.md lists them.
        ("devices/fs", "queue", 43),
        ("devices/fs", "owner", 45),
    ];
    for (program, policies) in policies() {
        for policy in policies {
            let other = OTHERS
                .iter()
                .find(|(p, name, _)| *p == program && *name == policy.name);
            let most = other.map_or(MOST, |(_, _, most)| *most);
            let allowed = policy.allowed();
            assert!(
                allowed.len() <= most,
                "{program}, {}: {} system calls, not {most}: {}",
                policy.name,
                allowed.len(),
                allowed.join(" ")
            );
        }
    }
}

fn program(policy: &Policy) -> Vec<Instruction> {
    let program = policy.program(Denial::Trap(0)).unwrap();
    program
        .iter()
        .map(|i| instruction(i.code, i.jt, i.jf, i.k))
        .collect()
}

#[test]
fn nothing_leads_out_of_the_jail() {
    // What opens, makes or reaches something new, or touches other processes.
    const NEVER: &[&str] = &[
        "open",
        "openat",
        "openat2",
        "open_by_handle_at",
        "creat",
        "socket",
        "connect",
        "bind",
        "listen",
        "execve",
        "execveat",
        "fork",
        "vfork",
        "kill",
        "tkill",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_open",
        "pidfd_getfd",
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "unshare",
        "setns",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "io_uring_setup",
        "memfd_create",
        "setuid",
        "setresuid",
        "capset",
        "keyctl",
        "init_module",
        "finit_module",
        "kexec_load",
        "reboot",
        "iopl",
        "ioperm",
        "unlink",
        "unlinkat",
        "rename",
    ];
    // What a back end does in the directory that it shares, its root.
    const IN_A_SHARE: &[&str] = &["openat", "unlinkat"];
    for (program, policies) in policies() {
        for policy in policies {
            for name in policy.allowed() {
                let shares = program == "devices/fs" && IN_A_SHARE.contains(&name);
                assert!(
                    !NEVER.contains(&name) || shares,
                    "{program}, policy {}: {name}",
                    policy.name
                );
            }
        }
    }
}

#[test]
fn no_link_of_a_share_is_followed() {
    for policy in load(&folder("devices/fs")).unwrap() {
        let program = program(&policy);
        let answer = |flags: i32| {
            let call = Call::new(libc::SYS_openat as u32, [7, 0, flags as u64, 0, 0, 0]);
            evaluate(&program, &call) & libc::SECCOMP_RET_ACTION_FULL
        };
        let what = &policy.name;
        // The first thread opens nothing; where the guest can only read nothing is opened for writing.
        let (writes, reads) = match what.as_str() {
            "main" => (libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_TRAP),
            "read" => (libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_ALLOW),
            _ => (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_ALLOW),
        };
        for (flags, wanted) in [
            (libc::O_RDONLY, reads),
            (libc::O_PATH, reads),
            (libc::O_WRONLY, writes),
            (libc::O_RDWR, writes),
            (libc::O_RDONLY | libc::O_TRUNC, writes),
            (libc::O_RDWR | libc::O_CREAT, writes),
        ] {
            assert_eq!(answer(flags), libc::SECCOMP_RET_TRAP, "{what}");
            assert_eq!(
                answer(flags | libc::O_NOFOLLOW),
                wanted,
                "{what}: {flags:#o}"
            );
        }
    }
}

#[test]
fn no_memory_becomes_code_and_no_process_begins() {
    for (name, policies) in policies() {
        for policy in policies {
            let program = program(&policy);
            let answer = |number: libc::c_long, arguments| {
                evaluate(&program, &Call::new(number as u32, arguments))
                    & libc::SECCOMP_RET_ACTION_FULL
            };
            let what = format!("{name}, policy {}", policy.name);
            for call in [libc::SYS_mmap, libc::SYS_mprotect] {
                let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
                let name = syscall_name(call as u32).unwrap();
                let data = answer(call, [0, 4096, 3, 0, 0, 0]);
                let allowed = policy.allowed().contains(&name);
                assert_eq!(data == libc::SECCOMP_RET_ALLOW, allowed, "{what}");
                let code = answer(call, [0, 4096, code, 0, 0, 0]);
                assert_eq!(code, libc::SECCOMP_RET_TRAP, "{what}");
            }
            let process = [libc::SIGCHLD as u64, 0, 0, 0, 0, 0];
            assert_eq!(
                answer(libc::SYS_clone, process),
                libc::SECCOMP_RET_TRAP,
                "{what}"
            );
            assert_ne!(
                answer(libc::SYS_clone3, [0; 6]),
                libc::SECCOMP_RET_ALLOW,
                "{what}"
            );
            assert_eq!(
                answer(libc::SYS_tgkill, [1, 1, 9, 0, 0, 0]),
                libc::SECCOMP_RET_TRAP
            );
        }
    }
}

/// The VMM of a guest that resets inherits the supervisor's filter. With software CPUs it makes
/// their code memory under it.
#[test]
fn the_supervisor_lets_a_vmm_map_code_only_for_software_cpus() {
    for policy in load(&folder("supervisor")).unwrap() {
        let program = program(&policy);
        let answer = |rights: i32, flags: i32| {
            let arguments = [0, 4096, rights as u64, flags as u64, 3, 0];
            evaluate(&program, &Call::new(libc::SYS_mmap as u32, arguments))
                & libc::SECCOMP_RET_ACTION_FULL
        };
        let code = libc::PROT_READ | libc::PROT_EXEC;
        let wanted = match policy.name.as_str() {
            "soft" | "soft-share" => libc::SECCOMP_RET_ALLOW,
            _ => libc::SECCOMP_RET_TRAP,
        };
        assert_eq!(answer(code, libc::MAP_SHARED), wanted, "{}", policy.name);
        for (rights, flags) in [
            (code | libc::PROT_WRITE, libc::MAP_SHARED),
            (code, libc::MAP_PRIVATE),
            (code, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            (code, libc::MAP_SHARED | libc::MAP_ANONYMOUS),
        ] {
            let what = &policy.name;
            assert_eq!(answer(rights, flags), libc::SECCOMP_RET_TRAP, "{what}");
        }
    }
}

/// What a VMM asks for after its guest has reset, and a device process that is started again, must
/// pass the supervisor's filter too.
#[test]
fn the_supervisor_leaves_its_children_their_system_calls() {
    for policy in load(&folder("supervisor")).unwrap() {
        let own = policy.allowed();
        // Where no directory is shared there is no `anemone-fs`.
        let shares = policy.name.ends_with("share");
        let present = |(program, _): &(String, _)| shares || program != "devices/fs";
        for (program, children) in policies().into_iter().filter(present) {
            for child in children {
                let missing: Vec<_> = child
                    .allowed()
                    .into_iter()
                    .filter(|name| !own.contains(name))
                    .collect();
                let (own, child) = (&policy.name, &child.name);
                assert!(
                    missing.is_empty(),
                    "{own} for {program}, {child}: {missing:?}"
                );
            }
        }
    }
}

/// The threads that start before the first one takes on its policy, and so inherit none.
const INDEPENDENT: &[(&str, &str)] = &[
    ("devices/blk", "queue"),
    ("devices/net", "queue"),
    ("devices/fs", "read"),
    ("devices/fs", "queue"),
    ("devices/fs", "owner"),
    ("devices/pmem", "flush"),
    ("vmm", "cpuid"),
    ("vmm", "device"),
    ("vmm", "irqfd"),
    ("vmm", "vcpu"),
    ("vmm", "vcpu-none"),
    ("vmm", "vcpu-soft"),
    // Of a process of its own.
    ("vmm", "probe"),
];

/// Filters stack, so a rule that the first thread does not have is no rule.
#[test]
fn the_first_thread_has_the_rules_of_all() {
    for (program, policies) in policies() {
        let main = policies.iter().find(|p| p.name == "main").unwrap();
        let inherit = |policy: &&Policy| !INDEPENDENT.contains(&(&program, &policy.name));
        for policy in policies.iter().filter(inherit) {
            for rule in policy.rules.iter().filter(|r| r.action == Action::Allow) {
                let there = main.rules.iter().any(|r| {
                    (r.syscall, &r.conditions, r.action)
                        == (rule.syscall, &rule.conditions, rule.action)
                });
                assert!(
                    there,
                    "{program}: `{}` of {} is not in main",
                    syscall_name(rule.syscall).unwrap(),
                    policy.name
                );
            }
        }
    }
}
