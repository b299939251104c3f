//! Compiles the system call policies of this program.

fn main() {
    anemone_policy::compile("policy");
}
