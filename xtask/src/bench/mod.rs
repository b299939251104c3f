//! `xtask bench`: figures, not verdicts. docs/testing.md describes how each is taken.

mod block;
mod client;
mod fs;
mod memory;
mod net;
mod soft;
mod start;
mod trace;
mod vmm;
mod vsock;

pub use block::run as block;
pub use fs::run as fs;
pub use memory::{of_family, run as memory};
pub use net::run as net;
pub use soft::{Engine, Plan, run as soft};
pub use start::run as start;
pub use vmm::ours;
pub use vsock::run as vsock;

/// The middle of some measurements; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which a share of the measurements lies; 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = share * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_the_values() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        assert_eq!(quantile(&[0.0, 10.0], 0.9), 9.0);
    }
}
