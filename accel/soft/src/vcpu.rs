//! One vCPU: the core's CPU on the thread that runs it.

use std::cell::RefCell;
use std::sync::Arc;

use anemone_accel_api::{Bus, Error, Regs, Result, Sregs, Stop, Vcpu, VcpuKick, VcpuState};
use anemone_soft_core::{ATTENTION_KICK, Config, Cpu, Exit, Signals};

use crate::doors::{Doors, Outside};

thread_local! {
    /// The CPU of this thread, with the signals that tell which it is. A CPU keeps x87 state in the
    /// registers of its thread, so it never leaves it, while a [`SoftVcpu`] is made on another.
    static CPU: RefCell<Option<(Arc<Signals>, Cpu)>> = const { RefCell::new(None) };
}

/// What the CPU will be, until its thread makes it.
struct Plan {
    config: Config,
    steps: Vec<Step>,
}

/// A change that was asked for before the CPU existed.
enum Step {
    Registers(Box<(Regs, Sregs)>),
    State(Box<VcpuState>),
}

impl Step {
    fn apply(&self, cpu: &mut Cpu) -> std::result::Result<(), String> {
        match self {
            Self::Registers(registers) => cpu.set_registers(&registers.0, &registers.1),
            Self::State(state) => cpu.set_state(state),
        }
    }
}

/// A vCPU of the software accelerator.
pub(crate) struct SoftVcpu {
    index: u32,
    signals: Arc<Signals>,
    doors: Arc<Doors>,
    plan: RefCell<Option<Plan>>,
}

impl SoftVcpu {
    pub(crate) fn new(config: Config, doors: Arc<Doors>) -> Self {
        let index = config.index;
        Self {
            index,
            signals: config.shared.signals[index as usize].clone(),
            doors,
            plan: RefCell::new(Some(Plan {
                config,
                steps: Vec::new(),
            })),
        }
    }

    /// Lends the CPU to `work`, made if it does not exist yet.
    fn with_cpu<R>(&self, work: impl FnOnce(&mut Cpu) -> Result<R>) -> Result<R> {
        CPU.with_borrow_mut(|place| {
            if let Some(plan) = self.plan.take() {
                // A vCPU that ran on this thread before is over.
                *place = None;
                let mut cpu = Cpu::new(plan.config).map_err(|e| Error::Guest(e.to_string()))?;
                for step in plan.steps {
                    step.apply(&mut cpu).map_err(Error::Guest)?;
                }
                *place = Some((self.signals.clone(), cpu));
            }
            match place {
                Some((signals, cpu)) if Arc::ptr_eq(signals, &self.signals) => work(cpu),
                _ => Err(Error::Guest("it belongs to another thread".to_owned())),
            }
        })
    }

    /// Makes a change, now or when the CPU is made.
    fn change(&mut self, step: Step) -> Result<()> {
        match self.plan.get_mut() {
            Some(plan) => {
                plan.steps.push(step);
                Ok(())
            }
            None => self.with_cpu(|cpu| step.apply(cpu).map_err(Error::Guest)),
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Stop> {
        let outside = Outside {
            cpu: self.index,
            doors: &self.doors,
            bus,
        };
        self.with_cpu(|cpu| match cpu.run(&outside) {
            Exit::Kicked => Ok(Stop::Kicked),
            Exit::TripleFault => Ok(Stop::TripleFault),
            Exit::Internal(text) => {
                // The registers are for the log; an error is one line.
                log::error!("CPU {}: {text}", self.index);
                let line = text.lines().next().unwrap_or_default();
                Err(Error::Guest(line.to_owned()))
            }
        })
    }

    fn kicker(&mut self) -> Box<dyn VcpuKick> {
        Box::new(SoftKick(self.signals.clone()))
    }

    fn state(&self) -> Result<VcpuState> {
        self.with_cpu(|cpu| Ok(cpu.state()))
    }

    fn set_registers(&mut self, regs: &Regs, sregs: &Sregs) -> Result<()> {
        self.change(Step::Registers(Box::new((*regs, *sregs))))
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        self.change(Step::State(Box::new(state.clone())))
    }
}

impl Drop for SoftVcpu {
    /// The CPU goes with its handle, or with its thread if that is another.
    fn drop(&mut self) {
        // Without a value if the thread itself ends.
        let _ = CPU.try_with(|place| {
            if let Ok(mut place) = place.try_borrow_mut()
                && place
                    .as_ref()
                    .is_some_and(|(s, _)| Arc::ptr_eq(s, &self.signals))
            {
                *place = None;
            }
        });
    }
}

/// Kicks a CPU.
struct SoftKick(Arc<Signals>);

impl VcpuKick for SoftKick {
    fn kick(&self) {
        self.0.raise(ATTENTION_KICK);
    }
}
