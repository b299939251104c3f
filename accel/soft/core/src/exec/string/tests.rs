use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::super::harness::{CODE, DATA, Guest};
use crate::block::Handler;
use crate::cpu::{Exception, Stopped, reg, rflags, seg, vector};
use crate::signals::ATTENTION_KICK;

/// A long stretch of memory.
const LONG: u64 = 0x8_0000;
const REP_MOVSB: &[u8] = &[0xF3, 0xA4];
const REP_STOSQ: &[u8] = &[0xF3, 0x48, 0xAB];
const REP_LODSB: &[u8] = &[0xF3, 0xAC];

/// Executes the instruction once; whether it is over.
fn once(guest: &mut Guest, bytes: &[u8]) -> bool {
    let instruction = decode(guest, bytes);
    execute(guest, super::handler(&instruction).unwrap(), &instruction)
}

fn decode(guest: &Guest, bytes: &[u8]) -> Instruction {
    let bits = match guest.cpu.code_mask() {
        0xFFFF => 16,
        0xFFFF_FFFF => 32,
        _ => 64,
    };
    Decoder::new(bits, bytes, DecoderOptions::NONE).decode()
}

fn execute(guest: &mut Guest, handler: Handler, instruction: &Instruction) -> bool {
    let cpu = &mut guest.cpu;
    cpu.leave_block = false;
    cpu.rip = CODE;
    cpu.next = CODE + instruction.len() as u64;
    handler(cpu, instruction).unwrap();
    assert_eq!(cpu.leave_block, cpu.next == CODE);
    cpu.next != CODE
}

/// Prepares a repetition.
fn guest(count: u64, from: u64, to: u64) -> Guest {
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RCX, count);
    guest.cpu.set_gpr(reg::RSI, from);
    guest.cpu.set_gpr(reg::RDI, to);
    guest
}

#[test]
fn a_long_string_lets_interrupts_in() {
    let length = 0x10_0000;
    let mut guest = guest(length / 8, 0, LONG);
    guest.cpu.set_gpr(reg::RAX, 0x0123_4567_89AB_CDEF);
    let mut parts = 1;
    while !once(&mut guest, REP_STOSQ) {
        // The timer is looked at before it goes on.
        assert_eq!(guest.cpu.clock_left, 0);
        let done = guest.cpu.gpr(reg::RDI) - LONG;
        assert_eq!(done / 8, length / 8 - guest.cpu.gpr(reg::RCX));
        parts += 1;
    }
    assert_eq!(parts, length / super::BUDGET);
    assert_eq!(guest.cpu.gpr(reg::RCX), 0);
    let bytes = guest.memory.read(LONG as usize, length as usize);
    let all = |chunk: &[u8]| chunk == 0x0123_4567_89AB_CDEF_u64.to_le_bytes();
    assert!(bytes.chunks(8).all(all));
    assert_eq!(guest.memory.read((LONG + length) as usize, 8), [0; 8]);
}

#[test]
fn a_request_ends_a_string_after_a_piece() {
    let mut guest = guest(0x8000, LONG, LONG + 0x4_0000);
    guest.cpu.signals.raise(ATTENTION_KICK);
    assert!(!once(&mut guest, REP_MOVSB));
    let left = guest.cpu.gpr(reg::RCX);
    assert!((0x7000..0x8000).contains(&left), "{left:#x}");
    assert!(guest.cpu.signals.take(ATTENTION_KICK));
    assert!(once(&mut guest, REP_MOVSB));
}

#[test]
fn single_steps_are_elements() {
    let mut guest = guest(3, LONG, LONG + 0x100);
    guest.cpu.system_flags |= rflags::TF;
    assert!(!once(&mut guest, REP_MOVSB));
    assert_eq!(guest.cpu.gpr(reg::RCX), 2);
    assert!(!once(&mut guest, REP_MOVSB));
    assert!(once(&mut guest, REP_MOVSB));
    assert_eq!(guest.cpu.gpr(reg::RDI), LONG + 0x103);
}

#[test]
fn an_overlap_repeats_its_beginning() {
    for distance in [1, 3, 8, 4095, 4096] {
        let mut guest = guest(0x3000, LONG, LONG + distance);
        let pattern: Vec<u8> = (0..distance).map(|n| (n * 7 + 1) as u8).collect();
        guest.memory.write(LONG as usize, &pattern);
        while !once(&mut guest, REP_MOVSB) {}
        let bytes = guest.memory.read(LONG as usize, 0x3000);
        let expected = (0..0x3000).map(|n| pattern[n % distance as usize]);
        assert!(bytes.into_iter().eq(expected), "{distance}");
    }
}

/// The guest in a 32-bit segment of `limit` bytes and one at RSI of `base`.
fn segmented(count: u64, from: u64, base: u64, limit: u32) -> Guest {
    let mut guest = guest(count, from, 0);
    guest.segment(seg::CS, 0xB, |cs| cs.big = true);
    guest.segment(seg::DS, 3, |ds| {
        ds.base = base;
        ds.limit = limit;
    });
    guest
}

#[test]
fn a_string_ends_at_the_limit_of_its_segment() {
    let mut guest = segmented(0x100, 0x10, DATA, 0x7F);
    guest.memory.write(DATA as usize + 0x7F, &[0x5A]);
    let instruction = decode(&guest, REP_LODSB);
    let handler = super::handler(&instruction).unwrap();
    assert!(handler(&mut guest.cpu, &instruction).is_err());
    let limit = Stopped::Exception(Exception::with(vector::GP, 0));
    assert_eq!(guest.cpu.stopped.take(), Some(limit));
    assert_eq!(guest.cpu.gpr(reg::RSI), 0x80);
    assert_eq!(guest.cpu.gpr(reg::RCX), 0x100 - 0x70);
    assert_eq!(guest.cpu.gpr(reg::RAX), 0x5A);
}

#[test]
fn pieces_end_at_the_limit_of_a_segment_too() {
    let mut guest = segmented(0x100, 0x10, DATA, 0x7F);
    guest.cpu.set_gpr(reg::RDI, LONG);
    // So that the pages are known.
    guest.cpu.load::<u8>(DATA).unwrap();
    guest.cpu.store(LONG, 0u8).unwrap();
    let instruction = decode(&guest, REP_MOVSB);
    let handler = super::handler(&instruction).unwrap();
    assert!(handler(&mut guest.cpu, &instruction).is_err());
    assert_eq!(guest.cpu.gpr(reg::RSI), 0x80);
    assert_eq!(guest.cpu.gpr(reg::RDI), LONG + 0x70);
    assert_eq!(guest.cpu.gpr(reg::RCX), 0x100 - 0x70);
}

#[test]
fn offsets_of_16_bits_wrap() {
    let mut guest = segmented(4, 0xFFFE, DATA, 0xFFFF);
    guest.cpu.segments[seg::CS].big = false;
    guest.segment(seg::ES, 3, |es| es.base = LONG);
    guest.cpu.set_gpr(reg::RDI, 0x1_0000);
    guest.cpu.set_gpr(reg::RCX, 0xABCD_0004);
    guest.memory.write(DATA as usize + 0xFFFE, &[1, 2]);
    guest.memory.write(DATA as usize, &[3, 4]);
    assert!(once(&mut guest, REP_MOVSB));
    assert_eq!(guest.memory.read(LONG as usize, 5), [1, 2, 3, 4, 0]);
    let registers = [reg::RCX, reg::RSI, reg::RDI].map(|number| guest.cpu.gpr(number));
    assert_eq!(registers, [0xABCD_0000, 2, 0x1_0004]);
}

/// Bytes per nanosecond: `cargo test --release -p anemone-soft-core -- --ignored --nocapture strings`.
#[test]
#[ignore = "a measurement"]
fn speed_of_strings() {
    let instructions: [(&str, &[u8], u64); 6] = [
        ("rep movsb", REP_MOVSB, 1),
        ("rep movsq", &[0xF3, 0x48, 0xA5], 8),
        ("rep stosb", &[0xF3, 0xAA], 1),
        ("rep stosq", REP_STOSQ, 8),
        ("repe cmpsb", &[0xF3, 0xA6], 1),
        ("repne scasb", &[0xF2, 0xAE], 1),
    ];
    for (name, bytes, size) in instructions {
        for length in [8, 64, 512, 4096, 1 << 18] {
            let mut guest = guest(0, 0, 0);
            let instruction = decode(&guest, bytes);
            let handler = super::handler(&instruction).unwrap();
            let rounds = (1 << 24) / (length + 64);
            let mut start = Instant::now();
            for round in 0..rounds + 8 {
                if round == 8 {
                    start = Instant::now();
                }
                // What is compared is equal, and what is searched for is not there.
                let scans = name.ends_with("scasb");
                guest.cpu.set_gpr(reg::RAX, u64::from(scans));
                guest.cpu.set_gpr(reg::RCX, length / size);
                guest.cpu.set_gpr(reg::RSI, LONG);
                guest.cpu.set_gpr(reg::RDI, LONG + 0x8_0000);
                while !execute(&mut guest, handler, &instruction) {}
            }
            let nanoseconds = start.elapsed().as_nanos() as f64 / rounds as f64;
            println!(
                "{name:12} {length:7} bytes: {nanoseconds:9.1} ns, {:6.2} bytes/ns",
                length as f64 / nanoseconds
            );
        }
    }
}
