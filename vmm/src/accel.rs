//! The accelerators in this build.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use anemone_accel_api::{Verdict, Vm, Work, spawn};
use anemone_cpu::Leaf;
use anemone_ipc::Received;
use anemone_ipc::vmm::{Accel, ToVmm, VmConfig};

use crate::error::Error;
use crate::jail;
use crate::run::Happenings;
use crate::threads::{Role, Threads};

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
    threads: &mut Threads,
) -> Result<Arc<dyn Vm>, Error> {
    // The accelerators name their threads.
    let threads = RefCell::new(threads);
    let spawn = |name: &str, work: Work| {
        let role = match name {
            "irqfd" => Role::Irqfd,
            _ => Role::Cpuid,
        };
        let happenings = happenings.clone();
        let work = move |restricted: Result<(), Error>| match restricted {
            Ok(()) => work(),
            Err(e) => happenings.fail(anemone_ipc::vmm::Event::Failed {
                message: e.to_string(),
            }),
        };
        let given = threads.borrow_mut().give(&role, work);
        given.map_err(io::Error::other)
    };
    match &config.accel {
        #[cfg(feature = "kvm")]
        Accel::Kvm { device } => {
            let device = received.take(*device)?;
            Ok(Arc::new(anemone_accel_kvm::KvmVm::new(
                device,
                &config.cpu_model,
                &spawn,
            )?))
        }
        #[cfg(feature = "soft")]
        Accel::Soft => Ok(Arc::new(anemone_accel_soft::SoftVm::new(
            &config.cpu_model,
            prepared.code,
            &spawn,
        )?)),
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
            jail::restrict_probe(settings.mode)?;
            let vm = anemone_accel_kvm::KvmVm::new(device, anemone_cpu::HOST, &spawn)?;
            Ok(anemone_accel_api::self_test(vm)?)
        }
        #[cfg(feature = "soft")]
        "soft" => {
            let prepared = Prepared::new(1)?;
            jail::enter(settings)?;
            jail::restrict_probe(settings.mode)?;
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
    jail::restrict_probe(settings.mode)?;
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
