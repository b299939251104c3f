//! The accelerators in this build.

use std::sync::Arc;

use anemone_accel_api::{Verdict, Vm};
use anemone_cpu::Leaf;
use anemone_ipc::Received;
use anemone_ipc::vmm::{Accel, ToVmm, VmConfig};
use anemone_sandbox::Mode;

use crate::error::Error;
use crate::jail;
use crate::run::Happenings;

/// Where `--self-test` and `--cpu-models` find `/dev/kvm`.
#[cfg(feature = "kvm")]
const DEVICE_FD: i32 = 4;

/// What an accelerator needs and the jail does not let a process make.
#[derive(Default)]
pub struct Prepared {
    #[cfg(feature = "soft")]
    code: Vec<anemone_accel_soft::CodeBuffer>,
}

impl Prepared {
    /// Code memory for so many software CPUs.
    pub fn new(soft_cpus: u32) -> Result<Self, Error> {
        #[cfg(feature = "soft")]
        return Ok(Self {
            code: (0..soft_cpus)
                .map(|_| anemone_accel_soft::code_memory())
                .collect::<Result<_, _>>()
                .map_err(Error::os("code memory of software CPUs"))?,
        });
        #[cfg(not(feature = "soft"))]
        match soft_cpus {
            0 => Ok(Self {}),
            _ => Err(not_in_build()),
        }
    }
}

fn not_in_build() -> Error {
    Error::Config("this build of anemone-vmm lacks the accelerator asked for".into())
}

/// Makes the virtual machine of the chosen accelerator, its CPUs of the given model.
#[allow(
    unused_variables,
    reason = "each accelerator needs some of it, and a build may lack any"
)]
pub fn create(
    config: &VmConfig,
    received: &mut Received<ToVmm>,
    prepared: Prepared,
    happenings: &Arc<Happenings>,
    mode: Mode,
) -> Result<Arc<dyn Vm>, Error> {
    match &config.accel {
        #[cfg(feature = "kvm")]
        Accel::Kvm { device } => {
            let device = received.take(*device)?;
            Ok(Arc::new(anemone_accel_kvm::KvmVm::new(
                device,
                &config.cpu_model,
            )?))
        }
        #[cfg(feature = "soft")]
        Accel::Soft => {
            let spawn = |name: &str, work| {
                let happenings = happenings.clone();
                spawn_restricted(name, work, happenings, mode)
            };
            Ok(Arc::new(anemone_accel_soft::SoftVm::new(
                &config.cpu_model,
                prepared.code,
                &spawn,
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
        _ => Err(not_in_build()),
    }
}

/// Enters the jail and lets an accelerator try to run a guest.
pub fn self_test(settings: &jail::Settings, accel: &str) -> Result<Verdict, Error> {
    match accel {
        #[cfg(feature = "kvm")]
        "kvm" => {
            let device = anemone_process::inherited_fd(DEVICE_FD)?;
            jail::enter(settings)?;
            let vm = anemone_accel_kvm::KvmVm::new(device, anemone_cpu::HOST)?;
            Ok(anemone_accel_api::self_test(vm)?)
        }
        #[cfg(feature = "soft")]
        "soft" => {
            let prepared = Prepared::new(1)?;
            jail::enter(settings)?;
            let spawn = |name: &str, work| {
                let thread = std::thread::Builder::new().name(name.to_owned());
                thread.spawn(work).map(drop)
            };
            let vm = anemone_accel_soft::SoftVm::new(anemone_cpu::HOST, prepared.code, &spawn)?;
            Ok(anemone_accel_api::self_test(vm)?)
        }
        _ => {
            let _ = settings;
            Err(not_in_build())
        }
    }
}

/// Names of accelerators and what CPUID offers guests under them.
pub type Offers = Vec<(&'static str, Option<Vec<Leaf>>)>;

/// Enters the jail and asks each accelerator that passes on or has a CPU what it offers guests on
/// this host; `None` where it cannot be asked.
pub fn offered(settings: &jail::Settings) -> Result<Offers, Error> {
    #[cfg(feature = "kvm")]
    let device = anemone_process::inherited_fd(DEVICE_FD).ok();
    jail::enter(settings)?;
    Ok(vec![
        #[cfg(feature = "kvm")]
        (
            "kvm",
            device.map(anemone_accel_kvm::offered_cpuid).transpose()?,
        ),
        #[cfg(feature = "soft")]
        ("soft", Some(anemone_accel_soft::offered())),
    ])
}

/// Starts the thread of `soft` that sends the devices' interrupts, in a jail of its own.
#[cfg(feature = "soft")]
fn spawn_restricted(
    name: &str,
    work: Box<dyn FnOnce() + Send>,
    happenings: Arc<Happenings>,
    mode: Mode,
) -> std::io::Result<()> {
    /// It moves numbers from one table to another.
    const STACK: usize = 64 << 10;
    let builder = std::thread::Builder::new();
    let thread = builder.name(name.to_owned()).stack_size(STACK);
    let body = move || {
        match jail::restrict_irqfd(mode) {
            Ok(()) => work(),
            Err(e) => happenings.fail(anemone_ipc::vmm::Event::Failed {
                message: e.to_string(),
            }),
        }
        anemone_sandbox::rest();
    };
    thread.spawn(body).map(drop)
}
