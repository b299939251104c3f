//! Where the process gives up its rights.

use crate::Common;

/// Gives up everything the device does not need.
pub fn enter(_common: &Common) -> Result<(), String> {
    Ok(())
}
