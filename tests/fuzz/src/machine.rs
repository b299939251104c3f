//! One random guest from start to end.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anemone_accel_api::{Bus, MemorySlot, MsiMessage, Regs, Sregs, Stop, Vcpu, Vm};

use crate::guest::{self, HIGH, RAM, ROM};
use crate::random::Random;

/// How long a guest runs before it is kicked.
const TIME: Duration = Duration::from_millis(3);
/// A kicked CPU answers within this time, on a busy host too.
const ANSWER: Duration = Duration::from_secs(5);
/// Guard on both sides of guest memory: an access that goes astray ends the process.
const GUARD: usize = 1 << 30;

/// Memory between guards.
struct Guarded {
    base: *mut u8,
    size: usize,
}

impl Guarded {
    fn new(size: usize) -> Self {
        let all = size + 2 * GUARD;
        // SAFETY: a new mapping, whose address the kernel chooses.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                all,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert!(base != libc::MAP_FAILED, "no address space");
        // SAFETY: within the mapping.
        let base = unsafe { base.cast::<u8>().add(GUARD) };
        // SAFETY: a page-aligned part of the mapping.
        let done = unsafe { libc::mprotect(base.cast(), size, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(done, 0, "no memory");
        Self { base, size }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable, and no guest runs while this is borrowed:
        // threads of a guest are joined before.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.size) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.base.sub(GUARD).cast(), self.size + 2 * GUARD) };
    }
}

/// Answers every access with something, and counts.
#[derive(Default)]
struct Noise(AtomicU64);

impl Noise {
    fn fill(&self, salt: u64, data: &mut [u8]) {
        let count = self.0.fetch_add(1, Ordering::Relaxed);
        let bytes = (count ^ salt)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }
}

impl Bus for Noise {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.fill(port.into(), data);
    }
    fn port_write(&self, _: u16, data: &[u8]) {
        assert!(
            matches!(data.len(), 1 | 2 | 4),
            "port access of {} bytes",
            data.len()
        );
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        assert!(
            address.is_multiple_of(data.len() as u64),
            "access is not aligned"
        );
        self.fill(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        assert!(
            matches!(data.len(), 1 | 2 | 4 | 8),
            "access of {} bytes",
            data.len()
        );
        assert!(
            address.is_multiple_of(data.len() as u64),
            "access is not aligned"
        );
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What became of a guest.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Triple faults.
    pub shutdowns: u64,
    /// Guests that the engine refused to go on with, by an error.
    pub errors: u64,
    /// CPUs that ran until they were kicked.
    pub kicked: u64,
    /// Accesses to the bus.
    pub bus: u64,
}

/// The CPU models that take turns, with the newer bits of CR4 that they have: FSGSBASE, OSXSAVE,
/// SMEP, SMAP.
const MODELS: [(&str, u64); 4] = [
    ("host", 0x35_0000),
    ("x86-64-v1-1", 0),
    ("x86-64-v2-1", 0),
    ("x86-64-v3-1", 0x15_0000),
];

/// Runs the guest of a seed.
pub fn run(seed: u64, verbose: bool) -> Result<Outcome, String> {
    let mut random = Random::new(seed);
    let (model, cr4) = random.pick(&MODELS);
    let cpus = if random.once_in(4) { 2 } else { 1 };
    let mut ram = Guarded::new(RAM);
    let mut rom = Guarded::new(ROM.1);
    let mut high = Guarded::new(HIGH.1);
    let (regs, sregs) = guest::make(&mut random, ram.bytes(), cr4);
    for byte in rom.bytes().iter_mut().chain(high.bytes()) {
        *byte = random.bits() as u8;
    }
    let rom_before = rom.bytes().to_vec();
    let vm = crate::vm(model, cpus)?;
    let slots = [
        (0, &ram, false),
        (ROM.0, &rom, true),
        (HIGH.0, &high, false),
    ];
    for (number, (guest, memory, read_only)) in slots.into_iter().enumerate() {
        let slot = MemorySlot {
            slot: number as u32,
            guest,
            size: memory.size as u64,
            host: memory.base,
            read_only,
            log_dirty: random.once_in(4),
        };
        // SAFETY: the memory outlives the VM, which is dropped below, and is only looked at
        // while no CPU runs.
        unsafe { vm.map_memory(slot) }.map_err(|e| e.to_string())?;
    }
    let bus = Noise::default();
    let over = AtomicBool::new(false);
    let mut vcpus = Vec::new();
    for index in 0..cpus {
        let mut vcpu = vm.create_vcpu(index, cpus).map_err(|e| e.to_string())?;
        if index == 0 {
            vcpu.set_registers(&regs, &sregs)
                .map_err(|e| e.to_string())?;
        }
        vcpus.push(vcpu);
    }
    let counts = Counts::default();
    let answered = std::thread::scope(|scope| {
        let (sender, kickers) = std::sync::mpsc::channel();
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|vcpu| {
                let (sender, bus, over, counts) = (sender.clone(), &bus, &over, &counts);
                let start = (regs, sregs);
                scope.spawn(move || cpu(vcpu, &start, &sender, bus, over, counts, verbose))
            })
            .collect();
        drop(sender);
        let kickers: Vec<_> = kickers.iter().take(threads.len()).collect();
        disturb(&*vm, cpus, &mut random);
        over.store(true, Ordering::SeqCst);
        kickers.iter().for_each(|k| k.kick());
        let asked = Instant::now();
        while !threads.iter().all(|t| t.is_finished()) {
            if asked.elapsed() > ANSWER {
                // The parent sees the death and names the seed.
                eprintln!("a CPU does not answer a kick");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        threads.into_iter().all(|t| t.join().is_ok())
    });
    drop(vm);
    if !answered {
        return Err("a CPU thread panicked".into());
    }
    if rom.bytes() != rom_before {
        return Err("read-only memory has changed".into());
    }
    Ok(Outcome {
        shutdowns: counts.shutdowns.into_inner(),
        errors: counts.errors.into_inner(),
        kicked: counts.kicked.into_inner(),
        bus: bus.0.into_inner(),
    })
}

#[derive(Default)]
struct Counts {
    shutdowns: AtomicU64,
    errors: AtomicU64,
    kicked: AtomicU64,
}

/// Sends interrupts to a running guest, as devices do: start-up messages, NMIs, vectors.
fn disturb(vm: &dyn Vm, cpus: u32, random: &mut Random) {
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        let mode = random.pick(&[0, 0, 0, 1, 4, 5, 6]);
        let vector = if mode == 6 {
            guest::STARTUP_PAGE
        } else {
            random.below(256) as u32
        };
        let message = MsiMessage {
            address: 0xFEE0_0000 | random.below(cpus.into()) << 12,
            data: mode << 8 | vector,
        };
        // A message that nobody can take is nobody's.
        let _ = vm.signal_msi(message);
        std::thread::sleep(Duration::from_micros(random.below(500)));
    }
}

type Kicker = Box<dyn anemone_accel_api::VcpuKick>;

/// Runs a CPU until the time is over; one that shut down starts again.
fn cpu(
    mut vcpu: Box<dyn Vcpu>,
    start: &(Regs, Sregs),
    kickers: &std::sync::mpsc::Sender<Kicker>,
    bus: &dyn Bus,
    over: &AtomicBool,
    counts: &Counts,
    verbose: bool,
) {
    // The receiver waits for one of each CPU.
    let _ = kickers.send(vcpu.kicker());
    loop {
        let stop = vcpu.run(bus);
        if verbose {
            println!("{stop:?}");
        }
        let over = over.load(Ordering::SeqCst);
        match stop {
            Ok(Stop::Kicked) if !over => {}
            Ok(Stop::TripleFault) => {
                counts.shutdowns.fetch_add(1, Ordering::Relaxed);
                if over || vcpu.set_registers(&start.0, &start.1).is_err() {
                    return;
                }
            }
            Ok(_) => {
                counts.kicked.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Err(_) => {
                counts.errors.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// A VM, for [`crate::vm`].
pub type AnyVm = Arc<dyn Vm>;
