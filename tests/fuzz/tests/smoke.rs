//! A short run of the fuzzer.

use std::process::Command;

#[test]
fn random_guests_do_no_harm() {
    let output = Command::new(env!("CARGO_BIN_EXE_anemone-fuzz"))
        .args(["--cases", "1000"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1000 guests"), "{text}");
}

/// Guests that did harm once: an instruction across two pages that are one in memory, freed twice;
/// exceptions that raise each other without end, which kept the CPU from hearing anything else.
#[test]
fn guests_that_did_harm_once_do_none() {
    for case in ["12689553604654797816", "11414043728750904804"] {
        for _ in 0..8 {
            let output = Command::new(env!("CARGO_BIN_EXE_anemone-fuzz"))
                .args(["--case", case])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{case}: {text}");
        }
    }
}
