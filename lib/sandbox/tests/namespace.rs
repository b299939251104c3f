//! A process that begins in a PID namespace. The only test of its process, see [`start_in`].

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use anemone_sandbox::{Layer, Mode, ProcessJail, enter};
use common::{User, call, filter, start, start_in};

#[test]
fn in_a_pid_namespace_there_is_nobody_else() {
    let mut sibling = start(User::Same, |handle| {
        handle.pause();
        0
    });
    assert!(sibling.wait_for_pause());
    let target = sibling.pid as u64;
    let parent_pid = Some(std::process::id());
    let namespaces = libc::CLONE_NEWUSER | libc::CLONE_NEWPID;
    let main = filter("main", 0, "");
    let child = start_in(namespaces, User::Same, |_| {
        let layers = enter(&ProcessJail {
            parent_pid,
            ..ProcessJail::default()
        })
        .unwrap();
        for layer in Layer::ALL {
            assert!(layers.is_active(layer), "{layers}");
        }
        // Not even whether it is there can be found out.
        let nobody = -i64::from(libc::ESRCH);
        assert_eq!(call(libc::SYS_kill, [target, 0, 0, 0, 0, 0]), nobody);
        let attach = u64::from(libc::PTRACE_ATTACH);
        assert_eq!(call(libc::SYS_ptrace, [attach, target, 0, 0, 0, 0]), nobody);
        anemone_sandbox::restrict(main, Mode::On).unwrap();
        call(libc::SYS_sync, [0; 6]);
        0
    });
    let pid = child.pid;
    let outcome = child.finish();
    // The report has the number that others know.
    let report = format!("denied: process {pid}, thread 1 ");
    assert_eq!(outcome.signal, Some(libc::SIGSYS), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(&report), "{}", outcome.stderr);
    assert_eq!(sibling.finish().exit, Some(0));
}
