//! Instructions on the arithmetic flags and on DF.

use anemone_soft_native::Flags;
use iced_x86::{Instruction, Mnemonic, Register};

use crate::block::Handler;
use crate::cpu::{Cpu, rflags};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Clc => |cpu, _| change(cpu, |flags| flags.with(Flags::CF, false)),
        Mnemonic::Stc => |cpu, _| change(cpu, |flags| flags.with(Flags::CF, true)),
        Mnemonic::Cmc => |cpu, _| change(cpu, |flags| flags.with(Flags::CF, !flags.any(Flags::CF))),
        Mnemonic::Cld => |cpu, _| {
            cpu.set_system_flags(cpu.system_flags & !rflags::DF);
            Ok(())
        },
        Mnemonic::Std => |cpu, _| {
            cpu.set_system_flags(cpu.system_flags | rflags::DF);
            Ok(())
        },
        Mnemonic::Lahf => |cpu, _| {
            // AH has the low byte of RFLAGS, where bit 1 is set.
            let low = cpu.flags().to_rflags() & 0xFF | rflags::FIXED;
            cpu.write_register(Register::AH, low);
            Ok(())
        },
        Mnemonic::Sahf => |cpu, _| {
            let ah = Flags::from_rflags(cpu.read_register(Register::AH));
            change(cpu, |flags| ah.replace(Flags::OF, flags))
        },
        Mnemonic::Salc => |cpu, _| {
            let carry = cpu.flags().any(Flags::CF);
            cpu.write_register(Register::AL, if carry { 0xFF } else { 0 });
            Ok(())
        },
        _ => return None,
    };
    Some(handler)
}

fn change(cpu: &mut Cpu, to: impl Fn(Flags) -> Flags) -> crate::cpu::Exec {
    cpu.set_flags(to(cpu.flags()));
    Ok(())
}
