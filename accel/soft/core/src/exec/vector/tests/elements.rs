//! Instructions that touch memory element by element, and states saved component by component.

use crate::cpu::{reg, vector};

use super::{Outcome, Pair, compare, initial, set_vector};
use crate::exec::harness::native::Block;
use crate::exec::harness::{DATA, PAGE, Second, generate};

/// All gathers, with indices around the second page. Where that is absent the guest stops in the
/// middle; when it goes on with the page in place, the outcome is that of the host, which never
/// stopped. (Which elements beyond the fault are done is up to the CPU.)
#[test]
fn gathers_equal_the_host() {
    let seed = u64::from(std::process::id());
    let mut pair = Pair::new(seed);
    let (mut done, mut stopped, mut begun) = (0, 0, 0);
    for case in 0..20_000 {
        if case % 50 == 0 {
            let memory: Vec<u8> = (0..2 * PAGE).map(|_| pair.random.next() as u8).collect();
            pair.second(Second::Memory);
            pair.fill(&memory);
        }
        // vgatherdpd, vgatherqpd, vgatherdps, vgatherqps and their integer twins, with xmm3 or ymm3,
        // [rbx + xmm4 * scale + 8], xmm5.
        let [opcode, wide, long] = [
            pair.random.below(4),
            pair.random.below(2),
            pair.random.below(2),
        ];
        let scale = pair.random.below(4) as u8;
        let bytes = [
            0xC4,
            0xE2,
            (wide << 7 | (!5 & 15) << 3 | long << 2 | 1) as u8,
            0x90 + opcode as u8,
            0x5C,
            scale << 6 | 4 << 3 | 3,
            8,
        ];
        let mut before = initial();
        generate::state(&mut pair.random, &mut before);
        let index_size = if opcode & 1 == 1 { 8 } else { 4 };
        let mut indices = [0; 32];
        for chunk in indices.chunks_mut(index_size) {
            let index = (pair.random.below(4096) as i64 - 2048) >> scale;
            chunk.copy_from_slice(&index.to_le_bytes()[..index_size]);
        }
        set_vector(&mut before, 4, &indices);
        let (mut ours, mut theirs) = (before.clone(), before);
        ours.gpr[reg::RBX] = DATA + 3000;
        theirs.gpr[reg::RBX] = pair.pages.base as u64 + 3000;
        pair.host.run(&bytes, &mut theirs).unwrap();
        theirs.gpr[reg::RBX] = ours.gpr[reg::RBX];
        pair.guest.load(&ours);
        if pair.random.one_in(2) {
            pair.guest.second(Second::Absent);
            if let Err(fault) = pair.guest.run(&bytes) {
                // The mask tells which element it was.
                let size = if wide == 1 { 8 } else { 4 };
                let mask = pair.guest.cpu.native.ymm(5);
                let element = mask.chunks(size).position(|chunk| chunk[size - 1] != 0);
                let element = element.unwrap();
                let mut index = [0; 8];
                let from = &indices[element * index_size..(element + 1) * index_size];
                index[..index_size].copy_from_slice(from);
                if from[index_size - 1] & 0x80 != 0 {
                    index[index_size..].fill(0xFF);
                }
                let offset = u64::from_le_bytes(index) << scale;
                let address = (DATA + 3008).wrapping_add(offset);
                let address = address.max(DATA + PAGE as u64);
                assert_eq!((fault.vector, fault.address), (vector::PF, address));
                stopped += 1;
                begun += usize::from(element > 0);
            }
            pair.guest.second(Second::Memory);
        }
        // With nothing left in the mask this does nothing.
        pair.guest.run(&bytes).unwrap();
        compare(&mut pair.guest.cpu, &theirs)
            .unwrap_or_else(|what| panic!("seed {seed}, case {case}: {bytes:02x?}: {what}"));
        done += 1;
    }
    println!("{done} done, {stopped} stopped, {begun} in the middle");
    assert!(stopped > 2_000 && begun > 1_000);
}

#[test]
fn byte_masked_moves_equal_the_host() {
    let seed = u64::from(std::process::id());
    let mut pair = Pair::new(seed);
    // maskmovdqu xmm3, xmm4; vmaskmovdqu xmm3, xmm4; maskmovq mm3, mm4; the last in GS, which
    // begins at 0 in both.
    let forms: [&[u8]; 3] = [
        &[0x66, 0x0F, 0xF7, 0xDC],
        &[0xC5, 0xF9, 0xF7, 0xDC],
        &[0x0F, 0xF7, 0xDC],
    ];
    let (mut done, mut faults) = (0, 0);
    for case in 0..6_000usize {
        let second = [Second::Memory, Second::Absent, Second::Device][case % 3];
        pair.second = second;
        pair.fill(&[0x11; 2 * PAGE]);
        let mut before = initial();
        generate::state(&mut pair.random, &mut before);
        // Nothing pending, so that MASKMOVQ gets as far as memory.
        before.area.0[..4].copy_from_slice(&[0x7F, 3, 0, 0x10]);
        if pair.random.one_in(4) {
            set_vector(&mut before, 4, &[0x7F; 32]);
        }
        let start = PAGE - 12 + pair.random.below(20) as usize;
        before.gpr[reg::RDI] = start as u64;
        let form = pair.random.below(3) as usize;
        let bytes = forms[form];
        if second != Second::Absent {
            let outcome = pair.run(bytes, &before, &[reg::RDI]);
            let outcome = outcome
                .unwrap_or_else(|what| panic!("seed {seed}, case {case}: {bytes:02x?}: {what}"));
            assert_eq!(outcome, Outcome::Done);
            done += 1;
            continue;
        }
        // Hosts may fault for bytes that are not selected; here only those that are count.
        let mask = if form == 2 {
            // MM4 is ST2 while TOP is 2.
            &before.area.0[64..72]
        } else {
            &before.area.0[224..240]
        };
        let first = (0..mask.len()).find(|at| mask[*at] & 0x80 != 0 && start + at >= PAGE);
        before.gpr[reg::RDI] += DATA;
        pair.guest.load(&before);
        let outcome = pair.guest.run(bytes);
        match first {
            Some(at) => {
                let fault = outcome.unwrap_err();
                assert_eq!(
                    (fault.vector, fault.address),
                    (vector::PF, DATA + (start + at) as u64)
                );
                assert_eq!(pair.guest.operands(second), [0x11; 2 * PAGE]);
                compare(&mut pair.guest.cpu, &before).unwrap();
                faults += 1;
            }
            None => assert_eq!(outcome, Ok(())),
        }
    }
    assert!(done == 4_000 && faults > 500, "{done} {faults}");
}

/// XSAVE, XSAVEOPT and XRSTOR with components in their initial configuration, in the area or in the
/// registers.
#[test]
fn xsave_knows_the_initial_configuration() {
    let mut pair = Pair::new(1);
    let mut cases = 0;
    for saved in 0..8u8 {
        for (asked, there) in (0..8u8).flat_map(|a| (0..8u8).map(move |b| (a, b))) {
            // xsave64, xsaveopt64, xrstor64, xrstor [rbx]
            for bytes in [
                &[0x48, 0x0F, 0xAE, 0x23][..],
                &[0x48, 0x0F, 0xAE, 0x33],
                &[0x48, 0x0F, 0xAE, 0x2B],
                &[0x0F, 0xAE, 0x2B],
            ] {
                let mut memory = vec![0; 2 * PAGE];
                let area = &mut memory[PAGE - 512..PAGE - 512 + 832];
                area.fill(0x55);
                area[24..28].copy_from_slice(&0x9FC0u32.to_le_bytes());
                area[512..576].fill(0);
                area[512] = there;
                pair.second = Second::Memory;
                pair.fill(&memory);
                // What the host has loaded with its initial configuration it knows as such.
                let mut before = Block::new();
                generate::state(&mut pair.random, &mut before);
                let image = &mut before.area.0;
                image[512] = saved;
                if saved & 1 == 0 {
                    image[..24].fill(0);
                    image[..2].copy_from_slice(&[0x7F, 3]);
                    image[32..160].fill(0);
                }
                if saved & 2 == 0 {
                    image[160..416].fill(0);
                }
                if saved & 4 == 0 {
                    image[576..].fill(0);
                }
                before.gpr[reg::RBX] = PAGE as u64 - 512;
                before.gpr[reg::RAX] = asked.into();
                before.gpr[reg::RDX] = 0;
                let outcome = pair.run(bytes, &before, &[reg::RBX]);
                let outcome = outcome.unwrap_or_else(|what| {
                    panic!("{bytes:02x?}: initial {saved}, asked {asked}, there {there}: {what}")
                });
                assert_eq!(outcome, Outcome::Done);
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 8 * 64 * 4);
}
