//! The accelerators in this build.

use std::sync::Arc;

use anemone_accel_api::Vm;
use anemone_ipc::Received;
use anemone_ipc::vmm::{Accel, ToVmm, VmConfig};

use crate::error::Error;

/// Makes the virtual machine of the chosen accelerator, its CPUs of the given model.
pub fn create(config: &VmConfig, received: &mut Received<ToVmm>) -> Result<Arc<dyn Vm>, Error> {
    match &config.accel {
        #[cfg(feature = "kvm")]
        Accel::Kvm { device } => {
            let device = received.take(*device)?;
            Ok(Arc::new(anemone_accel_kvm::KvmVm::new(
                device,
                &config.cpu_model,
            )?))
        }
        #[cfg(feature = "none")]
        Accel::None { socket } => {
            let socket = socket.map(|index| received.take(index)).transpose()?;
            Ok(Arc::new(anemone_accel_none::NoneVm::new(
                socket.map(Into::into),
            )))
        }
        #[allow(
            unreachable_patterns,
            reason = "reachable in builds that lack an accelerator"
        )]
        _ => {
            let _ = received;
            Err(Error::Config(
                "this build of anemone-vmm lacks the accelerator asked for".into(),
            ))
        }
    }
}
