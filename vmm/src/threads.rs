//! The threads of a VMM beside its first. They start when the process is in its jail but has no
//! system-call policy yet, take on a policy of their own, and wait for their work. So the first thread's policy
//! has neither what starting threads takes nor what they do.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use anemone_sandbox::{Filter, Mode};

use crate::error::Error;
use crate::jail::policies;

/// What a thread is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Runs the vCPU of this number.
    Vcpu(u32),
    /// Speaks with the back end of the device of this id.
    Device(String),
    /// Accelerator `soft`: sends the interrupts of devices.
    Irqfd,
    /// Accelerator `kvm`: asks what CPUs can be had, and ends.
    Cpuid,
}

/// What a thread does; it is told whether it is restricted.
type Work = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// Threads by their roles, as long as they have no work.
#[derive(Default)]
pub struct Threads(Vec<(Role, Sender<Work>)>);

/// The machine that threads are for.
#[derive(Debug, Default)]
pub struct Plan {
    /// Name of the accelerator.
    pub accel: String,
    pub cpus: u32,
    /// Ids of the devices that have a back end.
    pub devices: Vec<String>,
}

impl Plan {
    fn roles(&self) -> Vec<Role> {
        let own = match self.accel.as_str() {
            "soft" => Some(Role::Irqfd),
            "kvm" => Some(Role::Cpuid),
            _ => None,
        };
        let devices = self.devices.iter().cloned().map(Role::Device);
        own.into_iter()
            .chain(devices)
            .chain((0..self.cpus).map(Role::Vcpu))
            .collect()
    }
}

impl Role {
    fn name(&self) -> String {
        match self {
            Role::Vcpu(index) => format!("vcpu{index}"),
            Role::Device(id) => format!("dev-{id}").chars().take(15).collect(),
            Role::Irqfd => "irqfd".to_owned(),
            Role::Cpuid => "cpuid".to_owned(),
        }
    }

    fn stack_size(&self) -> usize {
        match self {
            // Register models and, without hardware for it, a CPU.
            Role::Vcpu(_) => 256 << 10,
            // Small messages and a memory table.
            Role::Device(_) => 128 << 10,
            // Numbers that move from one table to another.
            Role::Irqfd | Role::Cpuid => 64 << 10,
        }
    }

    fn policy(&self, accel: &str) -> &'static Filter {
        match (self, accel) {
            (Role::Vcpu(_), "soft") => &policies::VCPU_SOFT,
            (Role::Vcpu(_), "none") => &policies::VCPU_NONE,
            (Role::Vcpu(_), _) => &policies::VCPU,
            (Role::Device(_), _) => &policies::DEVICE,
            (Role::Irqfd, _) => &policies::IRQFD,
            (Role::Cpuid, _) => &policies::CPUID,
        }
    }
}

impl Threads {
    /// Starts the threads of a machine.
    ///
    /// # Errors
    /// There are no more to be had.
    pub fn start(plan: &Plan, mode: Mode) -> Result<Self, Error> {
        let mut threads = Vec::new();
        for role in plan.roles() {
            let (orders, work) = mpsc::channel();
            let policy = role.policy(&plan.accel);
            let ends = role == Role::Cpuid;
            thread::Builder::new()
                .name(role.name())
                .stack_size(role.stack_size())
                .spawn(move || {
                    serve(&work, policy, mode);
                    if !ends {
                        anemone_sandbox::rest();
                    }
                })
                .map_err(Error::os("starting a thread"))?;
            threads.push((role, orders));
        }
        Ok(Self(threads))
    }

    /// Gives a thread its work, once.
    ///
    /// # Errors
    /// There is none of that role: the command line was for another machine.
    pub fn give(
        &mut self,
        role: &Role,
        work: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) -> Result<(), Error> {
        let gone = || {
            let name = role.name();
            Error::Config(format!("the command line gives no work to a thread {name}"))
        };
        let at = self.0.iter().position(|(of, _)| of == role);
        let (_, orders) = self.0.swap_remove(at.ok_or_else(gone)?);
        orders.send(Box::new(work)).map_err(|_| gone())
    }
}

fn serve(orders: &Receiver<Work>, policy: &'static Filter, mode: Mode) {
    let restricted = anemone_sandbox::restrict(policy, mode).map_err(Error::from);
    // A machine that is not built has no work.
    if let Ok(work) = orders.recv() {
        work(restricted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_those_of_the_machine() {
        let plan = |accel: &str, cpus, devices: &[&str]| Plan {
            accel: accel.to_owned(),
            cpus,
            devices: devices.iter().map(|&id| id.to_owned()).collect(),
        };
        let names = |plan: Plan| plan.roles().iter().map(Role::name).collect::<Vec<_>>();
        assert_eq!(
            names(plan("soft", 2, &["disk0", "a-rather-long-name"])),
            ["irqfd", "dev-disk0", "dev-a-rather-lo", "vcpu0", "vcpu1"]
        );
        assert_eq!(names(plan("kvm", 1, &[])), ["cpuid", "vcpu0"]);
        assert_eq!(names(plan("none", 1, &[])), ["vcpu0"]);
    }

    #[test]
    fn a_thread_that_is_not_there_is_named() {
        let role = Role::Device("disk0".to_owned());
        let error = Threads::default().give(&role, |_| ()).unwrap_err();
        assert!(error.to_string().contains("dev-disk0"), "{error}");
    }
}
