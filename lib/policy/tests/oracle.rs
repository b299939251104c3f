//! Programs against things written by others: seccompiler's compiler and tables, the kernel
//! itself, and the sizes of KVM's structures.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;

use anemone_policy::{Action, Denial, Policy, Test, symbols, syscall_name, syscalls};
use anemone_sandbox::{Call, Filter, Instruction, Mode, evaluate, instruction};
use proptest::prelude::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

const REPORT: &str = "write # r\ngetpid # r\ngettid # r\nprctl # r\nrt_sigreturn # r\n";
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;
const ERRNO: u32 = libc::SECCOMP_RET_ERRNO;

fn parse(text: &str) -> Policy {
    Policy::parse("p", "p.policy", &format!("{REPORT}{text}"), &|_| None).unwrap()
}

fn program(policy: &Policy) -> Vec<Instruction> {
    let program = policy.program(Denial::Trap(7)).unwrap();
    program
        .iter()
        .map(|i| instruction(i.code, i.jt, i.jf, i.k))
        .collect()
}

/// What the language says about a call, straight from the rules.
fn meaning(policy: &Policy, call: &Call) -> u32 {
    let holds = |test: &Test| {
        let keep = if test.wide {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        let argument = call.arguments[usize::from(test.argument)];
        argument & test.mask & keep == test.value
    };
    policy
        .rules
        .iter()
        .find(|r| r.syscall == call.number && r.conditions.iter().all(|c| c.iter().any(holds)))
        .map_or(TRAP | 7, |r| match r.action {
            Action::Allow => ALLOW,
            Action::Errno(number) => ERRNO | u32::from(number),
        })
}

/// The policy as seccompiler compiles it: alternatives multiplied out, no errno rules. `None` if
/// that is too long.
fn foreign(policy: &Policy) -> Option<Vec<Instruction>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in &policy.rules {
        let list = rules.entry(i64::from(rule.syscall)).or_default();
        let mut products: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
        for condition in &rule.conditions {
            products = products
                .iter()
                .flat_map(|product| {
                    condition.iter().map(|test| {
                        let width = match test.wide {
                            true => SeccompCmpArgLen::Qword,
                            false => SeccompCmpArgLen::Dword,
                        };
                        let operator = SeccompCmpOp::MaskedEq(test.mask);
                        let mut product = product.clone();
                        product.push(
                            SeccompCondition::new(test.argument, width, operator, test.value)
                                .unwrap(),
                        );
                        product
                    })
                })
                .collect();
        }
        list.extend(
            products
                .into_iter()
                .filter(|p| !p.is_empty())
                .map(|p| SeccompRule::new(p).unwrap()),
        );
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.unwrap().try_into().ok()?;
    let ours = program.iter().map(|i| instruction(i.code, i.jt, i.jf, i.k));
    Some(ours.collect())
}

/// Numbers close to each other and to values of tests, so that equality happens.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..4,
        Just(u64::MAX),
        any::<u64>(),
        (0u64..4).prop_map(|v| v << 32)
    ]
}

fn condition() -> impl Strategy<Value = String> {
    let test = (
        0u8..6,
        any::<bool>(),
        prop_oneof![Just(u64::MAX), word()],
        word(),
    )
        .prop_map(|(argument, wide, mask, value)| {
            let keep = if wide { u64::MAX } else { u64::from(u32::MAX) };
            let (mask, width) = (mask & keep, if wide { ":64" } else { "" });
            match mask == keep {
                true => format!("arg{argument}{width}=={:#x}", value & keep),
                false => format!("arg{argument}{width}&{mask:#x}=={:#x}", value & mask),
            }
        });
    proptest::collection::vec(test, 1..6).prop_map(|mut tests| {
        tests.sort();
        tests.dedup();
        tests.join("|")
    })
}

/// A policy over a few system calls, with numbers from all over the table.
fn policy(errno: bool) -> impl Strategy<Value = Policy> {
    let number = prop_oneof![20u32..35, 280u32..300, 424u32..450];
    let rule = (proptest::collection::vec(condition(), 0..4), any::<bool>());
    let rules =
        proptest::collection::btree_map(number, proptest::collection::vec(rule, 1..4), 0..30);
    rules.prop_map(move |calls| {
        let mut kept = parse("");
        for (number, rules) in calls {
            let Some(name) = syscall_name(number) else {
                continue;
            };
            for (conditions, fails) in rules {
                let action = if fails && errno { "errno=ENOSYS" } else { "" };
                let line = format!("{name} {} {action} # r\n", conditions.join(" "));
                // Rules that make each other pointless are left out.
                if let Ok(next) = Policy::parse("p", "p", &(kept.text() + &line), &|_| None) {
                    kept = next;
                }
            }
        }
        kept
    })
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let number = prop_oneof![
        0u32..40,
        100u32..120,
        275u32..305,
        420u32..460,
        any::<u32>()
    ];
    let call = (number, proptest::array::uniform6(word())).prop_map(|(n, a)| Call::new(n, a));
    proptest::collection::vec(call, 200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn programs_mean_what_the_rules_say(policy in policy(true), calls in calls()) {
        let program = program(&policy);
        for call in calls {
            prop_assert_eq!(evaluate(&program, &call), meaning(&policy, &call), "{:?}", call);
        }
    }

    #[test]
    fn programs_agree_with_seccompiler(policy in policy(false), calls in calls()) {
        let (ours, theirs) = (program(&policy), foreign(&policy));
        prop_assume!(theirs.is_some());
        let theirs = theirs.unwrap();
        for call in calls {
            let ours = evaluate(&ours, &call) & libc::SECCOMP_RET_ACTION_FULL;
            prop_assert_eq!(ours, evaluate(&theirs, &call), "{:?}", call);
        }
    }
}

#[test]
fn other_tables_are_refused() {
    let program = program(&parse("read # r"));
    let mut call = Call::new(0, [0; 6]);
    assert_eq!(evaluate(&program, &call), ALLOW);
    // AUDIT_ARCH_I386: number 0 is restart_syscall there.
    call.architecture = 0x4000_0003;
    assert_eq!(evaluate(&program, &call), libc::SECCOMP_RET_KILL_PROCESS);
    // The x32 table shares the architecture and has bit 30 set.
    assert_eq!(
        evaluate(&program, &Call::new(0x4000_0000, [0; 6])),
        TRAP | 7
    );
}

#[test]
fn long_lists_reach_their_ends() {
    let values: Vec<String> = (0..700).map(|v| v.to_string()).collect();
    let policy = parse(&format!("ioctl arg1=={} # r\nread # r", values.join("|")));
    let program = program(&policy);
    for value in 0..800u64 {
        let call = Call::new(libc::SYS_ioctl as u32, [0, value, 0, 0, 0, 0]);
        assert_eq!(
            evaluate(&program, &call),
            meaning(&policy, &call),
            "{value}"
        );
    }
    let values: Vec<String> = (0..5000).map(|v| v.to_string()).collect();
    let policy = parse(&format!("ioctl arg1=={} # r", values.join("|")));
    let message = policy.program(Denial::Notify).unwrap_err().to_string();
    assert!(message.contains("policy p compiles to 5"), "{message}");
}

#[test]
fn system_call_numbers_agree_with_seccompiler() {
    for (number, name) in syscalls() {
        // Newer than its table.
        if number >= 463 {
            continue;
        }
        let json = serde_json::json!({"p": {
            "mismatch_action": "trap", "match_action": "allow", "filter": [{"syscall": name}],
        }});
        let programs =
            seccompiler::compile_from_json(json.to_string().as_bytes(), TargetArch::x86_64)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        // Behind the check of the architecture and the load of the number.
        assert_eq!(programs["p"][4].k, number, "{name}");
    }
}

#[test]
fn kvm_ioctl_numbers_agree_with_the_bindings() {
    use kvm_bindings::*;
    use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};
    const BOTH: u32 = _IOC_READ | _IOC_WRITE;
    let known: BTreeMap<_, _> = symbols().collect();
    let mut checked = 0;
    let mut check = |name: &str, direction, number, size: usize| {
        let expected = ioctl_expr(direction, KVMIO, number, size as u32);
        assert_eq!(
            libc::c_ulong::from(known[name]),
            expected as libc::c_ulong,
            "{name}"
        );
        checked += 1;
    };
    macro_rules! kvm {
        ($($name:ident $direction:ident $number:literal $type:ty;)*) => {
            $(check(stringify!($name), $direction, $number, size_of::<$type>());)*
        };
    }
    kvm! {
        KVM_GET_API_VERSION _IOC_NONE 0x00 ();
        KVM_CREATE_VM _IOC_NONE 0x01 ();
        KVM_GET_MSR_INDEX_LIST BOTH 0x02 kvm_msr_list;
        KVM_CHECK_EXTENSION _IOC_NONE 0x03 ();
        KVM_GET_VCPU_MMAP_SIZE _IOC_NONE 0x04 ();
        KVM_GET_SUPPORTED_CPUID BOTH 0x05 kvm_cpuid2;
        KVM_GET_MSR_FEATURE_INDEX_LIST BOTH 0x0A kvm_msr_list;
        KVM_CREATE_VCPU _IOC_NONE 0x41 ();
        KVM_GET_DIRTY_LOG _IOC_WRITE 0x42 kvm_dirty_log;
        KVM_SET_USER_MEMORY_REGION _IOC_WRITE 0x46 kvm_userspace_memory_region;
        KVM_SET_TSS_ADDR _IOC_NONE 0x47 ();
        KVM_SET_IDENTITY_MAP_ADDR _IOC_WRITE 0x48 u64;
        KVM_SET_GSI_ROUTING _IOC_WRITE 0x6A kvm_irq_routing;
        KVM_IRQFD _IOC_WRITE 0x76 kvm_irqfd;
        KVM_IOEVENTFD _IOC_WRITE 0x79 kvm_ioeventfd;
        KVM_SET_CLOCK _IOC_WRITE 0x7B kvm_clock_data;
        KVM_GET_CLOCK _IOC_READ 0x7C kvm_clock_data;
        KVM_RUN _IOC_NONE 0x80 ();
        KVM_GET_REGS _IOC_READ 0x81 kvm_regs;
        KVM_SET_REGS _IOC_WRITE 0x82 kvm_regs;
        KVM_GET_SREGS _IOC_READ 0x83 kvm_sregs;
        KVM_SET_SREGS _IOC_WRITE 0x84 kvm_sregs;
        KVM_GET_MSRS BOTH 0x88 kvm_msrs;
        KVM_SET_MSRS _IOC_WRITE 0x89 kvm_msrs;
        KVM_SET_SIGNAL_MASK _IOC_WRITE 0x8B kvm_signal_mask;
        KVM_GET_FPU _IOC_READ 0x8C kvm_fpu;
        KVM_SET_FPU _IOC_WRITE 0x8D kvm_fpu;
        KVM_GET_LAPIC _IOC_READ 0x8E kvm_lapic_state;
        KVM_SET_LAPIC _IOC_WRITE 0x8F kvm_lapic_state;
        KVM_SET_CPUID2 _IOC_WRITE 0x90 kvm_cpuid2;
        KVM_GET_MP_STATE _IOC_READ 0x98 kvm_mp_state;
        KVM_SET_MP_STATE _IOC_WRITE 0x99 kvm_mp_state;
        KVM_GET_VCPU_EVENTS _IOC_READ 0x9F kvm_vcpu_events;
        KVM_SET_VCPU_EVENTS _IOC_WRITE 0xA0 kvm_vcpu_events;
        KVM_GET_DEBUGREGS _IOC_READ 0xA1 kvm_debugregs;
        KVM_SET_DEBUGREGS _IOC_WRITE 0xA2 kvm_debugregs;
        KVM_SET_TSC_KHZ _IOC_NONE 0xA2 ();
        KVM_GET_TSC_KHZ _IOC_NONE 0xA3 ();
        KVM_ENABLE_CAP _IOC_WRITE 0xA3 kvm_enable_cap;
        KVM_GET_XSAVE _IOC_READ 0xA4 kvm_xsave;
        KVM_SET_XSAVE _IOC_WRITE 0xA5 kvm_xsave;
        KVM_SIGNAL_MSI _IOC_WRITE 0xA5 kvm_msi;
        KVM_GET_XCRS _IOC_READ 0xA6 kvm_xcrs;
        KVM_SET_XCRS _IOC_WRITE 0xA7 kvm_xcrs;
        KVM_KVMCLOCK_CTRL _IOC_NONE 0xAD ();
    }
    assert_eq!(
        checked,
        known.keys().filter(|name| name.starts_with("KVM_")).count()
    );
}

/// Runs `f` in a forked child; its wait status.
fn in_child(f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child makes system calls and exits without unwinding or destructors.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::_exit(f());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// getppid takes no arguments and so does no harm with any.
    #[test]
    fn the_kernel_does_what_the_rules_say(
        rules in proptest::collection::vec((condition(), any::<bool>()), 1..5),
        arguments in proptest::collection::vec(proptest::array::uniform6(word()), 100),
    ) {
        let mut policy = parse("exit_group # the child ends\ngetppid arg0==0x12345678 # never");
        for (condition, fails) in rules {
            let action = if fails { "errno=EPERM" } else { "" };
            let text = format!("{}getppid {condition} {action} # r", policy.text());
            if let Ok(next) = Policy::parse("p", "p", &text, &|_| None) {
                policy = next;
            }
        }
        let number = libc::SYS_getppid as u32;
        let (mut harmless, mut deadly) = (Vec::new(), None);
        for arguments in arguments {
            match meaning(&policy, &Call::new(number, arguments)) {
                ALLOW => harmless.push((arguments, None)),
                answer if answer & ERRNO == ERRNO => harmless.push((arguments, Some(libc::EPERM))),
                _ => deadly = Some(arguments),
            }
        }
        let program: &'static [Instruction] = program(&policy).leak();
        let filter: &'static Filter = Box::leak(Box::new(Filter::new("p", 7, program, &[])));
        let getppid = |[a, b, c, d, e, f]: [u64; 6]| {
            // SAFETY: the call ignores its arguments.
            unsafe { libc::syscall(libc::SYS_getppid, a, b, c, d, e, f) }
        };
        let restrict = || {
            // The report is the business of another test.
            // SAFETY: closes a descriptor of the child.
            unsafe { libc::close(2) };
            anemone_sandbox::restrict(filter, Mode::On).is_ok()
        };
        let status = in_child(|| {
            if !restrict() {
                return 1;
            }
            for (arguments, error) in &harmless {
                let result = getppid(*arguments);
                let got = (result < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten();
                if got != *error {
                    return 2;
                }
            }
            0
        });
        prop_assert_eq!(status, 0);
        if let Some(arguments) = deadly {
            let status = in_child(|| if restrict() { getppid(arguments) as i32 } else { 1 });
            prop_assert_eq!(status & 0x7F, libc::SIGSYS);
        }
    }
}
