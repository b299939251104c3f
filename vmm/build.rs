//! Compiles the system-call policies.

fn main() {
    anemone_policy::compile("policy");
}
