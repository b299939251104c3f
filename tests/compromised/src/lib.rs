//! What somebody would do who has taken over a process of Anemone: open files, make sockets, trace,
//! signal and read other processes, start programs, make code, and map memory that is not
//! granted. Each attempt must be refused, and be reported by the process itself.
//!
//! Only test builds contain this, by the feature `compromised` of `anemone-sandbox` and
//! `anemone-device`; `xtask` refuses a product with [`MARK`] in it. There, each thread tries
//! everything when it has taken its policy, and each device's first thread again while it serves the
//! guest, when [the test](Plan) says so, with what it then holds.
//!
//! A denied call ends the process in all other builds. Here the handler of SIGSYS goes back to the
//! attempt after its report ([`denied`]), and the next one is made: the kernel's answer is the same.

mod attempts;
mod call;
mod mapping;
mod memory;
mod outcome;
mod plan;

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

pub use attempts::{ATTEMPTS, Attempt, FATAL};
pub use call::go_back as denied;
pub use memory::{ATTEMPTS as MEMORY_ATTEMPTS, FIND, secret};
pub use outcome::{MARK, Outcome, Report};
pub use plan::Plan;

/// The policy in reports of a device that serves.
pub const SERVING: &str = "serving";

/// The process that has started this one.
static PARENT: AtomicI32 = AtomicI32::new(0);
/// The last round that this process has taken part in.
static ROUND: AtomicU32 = AtomicU32::new(0);

/// To be called before the jail is entered: takes what the attempts need from the outside.
pub fn prepare() {
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() };
    // A parent outside of its PID namespace has no number: then the first process there.
    PARENT.store(parent.max(1), Ordering::Relaxed);
    plan::prepare();
}

/// A thread of the process `role` has taken a policy: it tries everything.
pub fn restricted(role: &str, policy: &str) {
    if let Some((_, plan)) = plan::now() {
        attempt(role, 0, policy, &[ATTEMPTS], plan);
    }
}

/// The first thread of a device serves its guest and has nothing to do. In the first round that it
/// sees it tries everything; in the next it makes the [`FATAL`] call. A process that comes in
/// its place tries everything again.
pub fn serving(role: &str) {
    let Some((round, plan)) = plan::now() else {
        return;
    };
    match ROUND.fetch_max(round, Ordering::Relaxed) {
        0 if round > 0 => attempt(role, round, SERVING, &[ATTEMPTS, MEMORY_ATTEMPTS], plan),
        last if last < round => attempt(role, round, SERVING, &[std::slice::from_ref(FATAL)], plan),
        _ => {}
    }
}

fn attempt(role: &str, round: u32, policy: &str, attempts: &[&[Attempt]], mut plan: Plan) {
    let parent = PARENT.load(Ordering::Relaxed);
    if !plan.processes.contains(&parent) {
        plan.processes.push(parent);
    }
    for attempt in attempts.iter().copied().flatten() {
        Report {
            role: role.to_owned(),
            round,
            policy: policy.to_owned(),
            name: attempt.name.to_owned(),
            outcome: (attempt.run)(&plan),
        }
        .print();
    }
}
