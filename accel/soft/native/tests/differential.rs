//! Every claimed form against the host CPU.

mod harness;

/// Enough for every form to meet several hundred states; long runs: `cargo run --example differential`.
const CASES_PER_THREAD: u64 = 550_000;

#[test]
fn every_form_equals_the_host() {
    let seed = std::process::id().into();
    let threads: Vec<_> = [seed, seed + 1]
        .map(|seed| std::thread::spawn(move || harness::run(seed, CASES_PER_THREAD)))
        .into();
    for thread in threads {
        match thread.join().unwrap() {
            Ok(summary) => {
                println!("{summary:?}");
                assert!(
                    summary.thunk_forms > 900 && summary.integer_forms > 200,
                    "{summary:?}"
                );
                assert!(summary.not_covered.is_empty(), "{summary:?}");
            }
            Err(text) => panic!("{text}"),
        }
    }
}

#[test]
fn alignment_is_what_the_host_enforces() {
    let checked = harness::alignment(7).unwrap();
    assert!(checked > 300, "{checked}");
}
