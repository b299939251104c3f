# Exceptions of 64-bit code at CPL 0: vector, error code, return address, and what handlers see.

    case "undefined"
    fault "ud2", UD, 0, ud2
    fault "ud1", UD, 0, .byte 0x0f, 0xb9, 0xc0
    fault "push-es", UD, 0, .byte 0x06
    fault "into", UD, 0, .byte 0xce
    fault "aaa", UD, 0, .byte 0x37
    fault "pusha", UD, 0, .byte 0x60
    fault "mov-to-cs", UD, 0, .byte 0x8e, 0xc8
    fault "mov-from-cr1", UD, 0, .byte 0x0f, 0x20, 0xc8
    fault "lock-add-to-register", UD, 0, .byte 0xf0, 0x01, 0xc0
    fault "lea-of-register", UD, 0, .byte 0x8d, 0xc0
    fault "far-jump-direct", UD, 0, .byte 0xea
    finish

# The rig's processor takes these.
    case "undefined-lock", where=NOT_KVM
    movl $FRAMES, %eax
    fault "lock-mov", UD, 0, .byte 0xf0, 0x89, 0x00
    fault "lock-cmp", UD, 0, .byte 0xf0, 0x39, 0x00
    fault "lock-shl", UD, 0, .byte 0xf0, 0xd1, 0x20
    fault "lock-nop", UD, 0, .byte 0xf0, 0x90
    finish

    case "divide"
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $1, %eax
    fault "div-zero", DE, 0, divl %ecx
    fault "idiv-zero-byte", DE, 0, idivb %cl
    movl $1, %edx
    movl $1, %ecx
    fault "div-overflow", DE, 0, divl %ecx
    check "rax-kept", %rax, 1
    check "rdx-kept", %rdx, 1
    movabsq $0x8000000000000000, %rax
    movq $-1, %rdx
    movq $-1, %rcx
    fault "idiv-overflow", DE, 0, idivq %rcx
    movl $0x100, %eax
    movl $1, %ecx
    fault "div-overflow-byte", DE, 0, divb %cl
    finish

    case "traps"
    trap "int3", BP, 0, int3
    trap "int-0x80", BACK, 0, int $BACK
    trap "int-3-long", BP, 0, .byte 0xcd, 3
    trap "int-0x20", 0x20, 0, int $0x20
    check "frame-cs", last_cs-org, CODE64
    check "frame-ss", last_ss-org, DATA
    finish

# The frame: the stack is aligned to 16 bytes first; a gate decides about IF; TF, NT and RF are
# cleared in any case.
    case "frame"
    movq $STACK, %rsp
    fault "aligned", UD, 0, ud2
    check "rsp", last_rsp-org, STACK
    check "handler-rsp", handler_rsp-org, STACK
    pushq $0
    fault "unaligned", UD, 0, ud2
    check "rsp-unaligned", last_rsp-org, STACK - 8
    # The pushed frame begins at the aligned address; what lies between is skipped.
    movq handler_rsp-org, %rax
    check "handler-rsp-aligned", %rax, STACK - 16
    addq $8, %rsp
    gate UD, stubs64 + 16 * UD, 0x8f
    pushq $FLAG_IF | FLAG_NT | FLAG_DF | FLAG_OF | FLAG_CF | 2
    popfq
    fault "trap-gate", UD, 0, ud2
    cld
    movq handler_flags-org, %rax
    check "trap-gate-flags", %rax, FLAG_IF | FLAG_DF | FLAG_OF | FLAG_CF | 2
    # Whether RF is set in the pushed flags is left out: the emulated processor of the rig does
    # not set it for faults.
    movq last_flags-org, %rax
    andq $~FLAG_RF, %rax
    check "pushed-flags", %rax, FLAG_IF | FLAG_NT | FLAG_DF | FLAG_OF | FLAG_CF | 2
    gate UD, stubs64 + 16 * UD
    pushq $FLAG_IF | 2
    popfq
    fault "interrupt-gate", UD, 0, ud2
    movq handler_flags-org, %rax
    check "interrupt-gate-flags", %rax, 2
    finish

    case "interrupt-stack-table"
    gate UD, stubs64 + 16 * UD, 0x8e, 1
    gate GP, stubs64 + 16 * GP, 0x8e, 2
    fault "ist-1", UD, 0, ud2
    check "ist-1-handler-rsp", handler_rsp-org, STACK_IST1
    check "ist-1-ss", last_ss-org, DATA
    movq $STACK - 24, %rsp
    fault "ist-1-unaligned-rsp", UD, 0, ud2
    check "ist-1-pushed-rsp", last_rsp-org, STACK - 24
    movq $STACK, %rsp
    movl $0x1234, %ecx
    fault "ist-2-error-code", GP, 0, rdmsr
    check "ist-2-handler-rsp", handler_rsp-org, STACK_IST2
    # An unaligned entry of the table is aligned as well.
    movq $STACK_IST1 + 8, tss-org + 36
    fault "ist-1-unaligned-entry", UD, 0, ud2
    check "ist-1-aligned", handler_rsp-org, STACK_IST1
    # With a stack pointer that cannot be used, only the table helps.
    movabsq $0x8000000000000000, %rax
    recover_at 1f
    movq %rax, %rsp
2:  ud2
1:  check_exception "non-canonical-rsp", UD, 0, 2b-org
    movabsq $0x8000000000000000, %rax
    check_same "non-canonical-pushed", last_rsp-org, %rax
    user "from-user", UD, 0, ud2
    check "from-user-handler-rsp", handler_rsp-org, STACK_IST1
    finish

    case "canonical"
    movabsq $0x800000000000, %rax
    movabsq $0xffff800000000000, %rbx
    movabsq $0x7ffffffffffd, %rdi
    fault "read", GP, 0, movq (%rax), %rcx
    fault "write", GP, 0, movb %cl, (%rax)
    fault "read-top", GP, 0, movb -1(%rbx), %cl
    fault "modify", GP, 0, lock incl (%rax)
    fault "invlpg", NONE, 0, invlpg (%rax)
    # FS base plus displacement is what is checked.
    write_msr MSR_FS_BASE, 0x7ffffffff000
    fault "fs-read", GP, 0, movl %fs:0x1000, %ecx
    finish

# The rig's processor takes any value.
    case "canonical-registers", where=NOT_KVM
    movl $MSR_FS_BASE, %ecx
    xorl %eax, %eax
    movl $0xffff8000, %edx
    fault "fs-base-canonical", NONE, 0, wrmsr
    movl $0x8000, %edx
    fault "fs-base", GP, 0, wrmsr
    movl $MSR_GS_BASE, %ecx
    fault "gs-base", GP, 0, wrmsr
    movl $MSR_KERNEL_GS_BASE, %ecx
    fault "kernel-gs-base", GP, 0, wrmsr
    movl $MSR_LSTAR, %ecx
    fault "lstar", GP, 0, wrmsr
    movl $MSR_SYSENTER_EIP, %ecx
    fault "sysenter-eip", GP, 0, wrmsr
    movl $MSR_FS_BASE, %ecx
    rdmsr
    check "fs-base-kept", %rdx, 0xffff8000
    finish

# Through the stack segment the exception is #SS. The rig's processor raises #GP.
    case "canonical-stack", where=NOT_KVM
    movabsq $0x800000001000, %rbp
    fault "read-rbp", SS, 0, movq (%rbp), %rcx
    fault "write-rbp", SS, 0, movq %rcx, 8(%rbp)
    gate SS, stubs64 + 16 * SS, 0x8e, 1
    gate GP, stubs64 + 16 * GP, 0x8e, 2
    gate PF, stubs64 + 16 * PF, 0x8e, 2
    gate DF, stubs64 + 16 * DF, 0x8e, 2
    recover_at 1f
    movq %rbp, %rsp
2:  pushq %rax
1:  check_exception "push", SS, 0, 2b-org
    recover_at 1f
    movq %rbp, %rsp
2:  popq %rax
1:  check_exception "pop", SS, 0, 2b-org
    recover_at 1f
    movq %rbp, %rsp
2:  call no_exception
1:  check_exception "call", SS, 0, 2b-org
    finish

    case "segment-loads"
    set_entry spare-org, 0x00cf13000000ffff         # not present, data
    set_entry spare-org+8, 0x00cf98000000ffff       # execute only
    set_entry spare-org+16, 0x00cf91000000ffff      # read only
    set_entry spare-org+24, 0x00cff3000000ffff      # DPL 3
    set_entry spare-org+32, 0x00cf92000000ffff      # not accessed
    set_entry spare-org+40, 0x00cf1b000000ffff      # not present, code
    movl $0x1238, %eax
    fault "ds-beyond-limit", GP, 0x1238, movl %eax, %ds
    movl $SPARE, %eax
    fault "ds-not-present", NP, SPARE, movl %eax, %ds
    fault "ss-not-present", SS, SPARE, movl %eax, %ss
    movl $SPARE + 8, %eax
    fault "ds-execute-only", GP, SPARE + 8, movl %eax, %ds
    fault "ss-code", GP, SPARE + 8, movl %eax, %ss
    movl $SPARE + 16, %eax
    fault "ds-read-only", NONE, 0, movl %eax, %ds
    fault "ss-read-only", GP, SPARE + 16, movl %eax, %ss
    movl $SPARE + 24 + 3, %eax
    fault "ds-dpl-3", NONE, 0, movl %eax, %ds
    fault "ss-rpl-3", GP, SPARE + 24, movl %eax, %ss
    movl $DATA + 3, %eax
    fault "ds-rpl-3-dpl-0", GP, DATA, movl %eax, %ds
    movl $TSS, %eax
    fault "es-system", GP, TSS, movl %eax, %es
    movl $4, %eax
    fault "fs-no-ldt", GP, 4, movl %eax, %fs
    xorl %eax, %eax
    fault "ds-null", NONE, 0, movl %eax, %ds
    fault "ss-null", NONE, 0, movl %eax, %ss
    fault "null-segments-work", NONE, 0, movl RESULTS, %ecx
    movl $3, %eax
    fault "gs-null-rpl-3", NONE, 0, movl %eax, %gs
    movl $DATA, %eax
    movl %eax, %ss
    movl $SPARE + 32, %eax
    movl %eax, %es
    movq spare-org+32, %rax
    check "accessed-bit", %rax, 0x00cf93000000ffff
    fault "lss-not-present", SS, SPARE, lss far_pointer-org, %ecx
    fault "lfs-not-present", NP, SPARE, lfs far_pointer-org, %ecx
    movw $SPARE + 40, far_pointer-org+4
    fault "jump-not-present", NP, SPARE + 40, ljmpl *far_pointer-org
    fault "call-not-present", NP, SPARE + 40, lcalll *far_pointer-org
    movw $DATA, far_pointer-org+4
    fault "jump-data", GP, DATA, ljmpl *far_pointer-org
    movw $0, far_pointer-org+4
    fault "jump-null", GP, 0, ljmpl *far_pointer-org
    movw $USER64, far_pointer-org+4
    fault "jump-dpl-3", GP, USER64 - 3, ljmpl *far_pointer-org
    movw $0x1238, far_pointer-org+4
    fault "jump-beyond-limit", GP, 0x1238, ljmpl *far_pointer-org
    finish
    .balign 8
far_pointer:
    .long 0
    .short SPARE
    .short 0

# The rig's processor jumps there, and loads a null TR.
    case "segment-kinds", where=NOT_KVM
    xorl %ecx, %ecx
    fault "ltr-null", GP, 0, ltr %cx
    set_entry spare-org, 0x00ef9b000000ffff
    fault "jump-l-and-d", GP, SPARE, ljmpl *far_pointer-org
    finish

    case "returns"
    pushq $0
    pushq $0
    fault "lret-null", GP, 0, lretq
    movq $DATA, 8(%rsp)
    fault "lret-data", GP, DATA, lretq
    movq $0x1238, 8(%rsp)
    fault "lret-beyond-limit", GP, 0x1238, lretq
    addq $16, %rsp
    pushq $DATA
    pushq $STACK
    pushq $2
    pushq $0
    pushq $2f-org
    fault "iret-null-cs", GP, 0, iretq
    movq $DATA, 8(%rsp)
    fault "iret-data-cs", GP, DATA, iretq
    movq $USER64, 8(%rsp)
    fault "iret-ss-rpl", GP, DATA, iretq
    movq $CODE64, 8(%rsp)
    movq $TSS, 32(%rsp)
    fault "iret-ss-system", GP, TSS, iretq
    pushfq
    orq $FLAG_NT, (%rsp)
    popfq
    fault "iret-nested-task", GP, 0, iretq
    pushq $2
    popfq
    movq $DATA, 32(%rsp)
    movq $STACK - 16, 24(%rsp)
    movq $FLAG_DF | FLAG_CF | 2, 16(%rsp)
    iretq
2:  pushfq
    popq %rax
    cld
    check "iret-flags", %rax, FLAG_DF | FLAG_CF | 2
    check "iret-rsp", %rsp, STACK - 16
    finish

# Faults while an event is delivered.
    case "delivery"
    movw $DATA, idt64-org + 16 * 0x32 + 2
    fault "gate-to-data", GP, DATA, int $0x32
    movw $0, idt64-org + 16 * 0x33 + 2
    fault "gate-to-null", GP, 0, int $0x33
    movw $CODE32, idt64-org + 16 * 0x34 + 2
    fault "gate-to-32-bit-code", GP, CODE32, int $0x34
    movw $0x8e07, idt64-org + 16 * 0x35 + 4
    movw $0x20, tss_descriptor-org
    movb $0x89, tss_descriptor-org+5
    movl $TSS, %eax
    ltr %ax
    fault "ist-beyond-tss", TS, TSS, int $0x35
    # Contributory and page faults while a page fault or contributory one is delivered.
    gate GP, stubs64 + 16 * GP, 0x0e
    movabsq $0x800000000000, %rbx
    fault "double-fault-gp", DF, 0, movl (%rbx), %eax
    gate PF, stubs64 + 16 * PF, 0x0e
    fault "double-fault-pf", DF, 0, movl TEST, %eax
    gate GP, stubs64 + 16 * GP
    gate PF, stubs64 + 16 * PF
    finish

# Error codes that refer to the IDT. EXT is set if the event is not a software interrupt. The rig's
# processor multiplies the vector by 16, and never sets EXT.
    case "delivery-error-codes", where=NOT_KVM
    andw $0x7fff, idt64-org + 16 * 0x30 + 4
    fault "gate-not-present", NP, 0x30 * 8 + 2, int $0x30
    movw $0x8d00, idt64-org + 16 * 0x31 + 4
    fault "gate-type", GP, 0x31 * 8 + 2, int $0x31
    user "int-dpl-0", GP, 0x81 * 8 + 2, int $0x81
    lidt small_idt-org
    fault "beyond-idt", GP, 0x80 * 8 + 2, int $0x80
    lidt idt64_pointer-org
    gate UD, stubs64 + 16 * UD, 0x0e
    fault "ud-gate-not-present", NP, UD * 8 + 3, ud2
    movw $0x8e00, idt64-org + 16 * UD + 4
    movw $DATA, idt64-org + 16 * UD + 2
    fault "ud-gate-to-data", GP, DATA + 1, ud2
    finish
    .balign 8
small_idt:
    .short 0x100
    .quad idt64-org

    case "triple-fault", end=BY_TRIPLE_FAULT
    gate GP, stubs64 + 16 * GP, 0x0e
    gate DF, stubs64 + 16 * DF, 0x0e
    movl $1, %eax
    check "before", %rax, 1
    movabsq $0x800000000000, %rbx
    movl (%rbx), %eax
    movl $2, %eax
    check "after", %rax, 1
    finish

    case "triple-fault-no-idt", end=BY_TRIPLE_FAULT
    lidt empty_idt-org
    ud2
    finish
empty_idt:
    .short 0
    .quad 0

    case "fpu-exceptions"
    fninit
    set_bits %cr0, CR0_TS
    fault "ts-x87", NM, 0, fld1
    fault "ts-wait", NM, 0, fwait
    fault "ts-mmx", NM, 0, movd %eax, %mm0
    fault "ts-sse", NM, 0, movaps %xmm0, %xmm1
    fault "ts-fxsave", NM, 0, fxsave FRAMES
    fault "ts-integer", NONE, 0, sfence
    fault "ts-prefetch", NONE, 0, prefetcht0 (%rax)
    clts
    fault "clts", NONE, 0, fld1
    set_bits %cr0, 4
    fault "em-x87", NM, 0, fld1
    fault "em-sse", UD, 0, movaps %xmm0, %xmm1
    fault "em-mmx", UD, 0, movd %eax, %mm0
    fault "em-wait", NONE, 0, fwait
    clear_bits %cr0, 4
    clear_bits %cr0, CR0_MP
    set_bits %cr0, CR0_TS
    fault "ts-without-mp-wait", NONE, 0, fwait
    clts
    set_bits %cr0, CR0_MP
    clear_bits %cr4, CR4_OSFXSR
    fault "no-osfxsr", UD, 0, movaps %xmm0, %xmm1
    set_bits %cr4, CR4_OSFXSR
    # The exception comes with the next waiting instruction.
    fninit
    movw $0x37b, FRAMES
    fldcw FRAMES
    fld1
    fldz
    fault "mf-pending", NONE, 0, fdivrp %st, %st(1)
    fnstsw %ax
    andl $0x80ff, %eax
    check "mf-status", %rax, 0x8084
    fault "mf-wait", MF, 0, fwait
    fault "mf-not-fnstcw", NONE, 0, fnstcw FRAMES
    fnclex
    fault "mf-cleared", NONE, 0, fld1
    fninit
    finish

# The rig's processor never raises #XM.
    case "simd-exceptions", where=NOT_KVM
    movl $0x1d80, FRAMES            # division by zero not masked
    ldmxcsr FRAMES
    movl $0x3f800000, %eax
    movd %eax, %xmm0
    xorps %xmm1, %xmm1
    fault "divide", XM, 0, divss %xmm1, %xmm0
    movd %xmm0, %eax
    check "destination-kept", %rax, 0x3f800000
    stmxcsr FRAMES
    movl FRAMES, %eax
    check "mxcsr", %rax, 0x1d84
    clear_bits %cr4, CR4_OSXMMEXCPT
    fault "no-osxmmexcpt", UD, 0, divss %xmm1, %xmm0
    finish

# The rig's processor looks for pending exceptions at FWAIT only.
    case "fpu-pending", where=NOT_KVM
    fninit
    movw $0x37b, FRAMES
    fldcw FRAMES
    fld1
    fldz
    fdivrp %st, %st(1)
    fault "fld", MF, 0, fld1
    fault "fadd", MF, 0, fadd %st, %st
    fault "mmx", MF, 0, movd %eax, %mm0
    fault "fnclex", NONE, 0, fnclex
    fault "fld-cleared", NONE, 0, fld1
    finish

# The rig's processor takes any value.
    case "mxcsr-reserved", where=NOT_KVM
    movl $0x1f80 | 1 << 16, FRAMES
    fault "ldmxcsr", GP, 0, ldmxcsr FRAMES
    finish

    case "alignment-cmpxchg16b"
    need 1, 0, %ecx, 13
    fault "cmpxchg16b", GP, 0, cmpxchg16b FRAMES+8
    finish

    case "alignment"
    fault "fxsave", GP, 0, fxsave FRAMES+8
    fault "fxrstor", GP, 0, fxrstor FRAMES+8
    # Alignment checks are for CPL 3 only.
    set_bits %cr0, CR0_AM
    pushq $FLAG_AC | 2
    popfq
    fault "cpl-0", NONE, 0, movl FRAMES+1, %eax
    finish

# The rig's processor does not check the alignment of SSE operands.
    case "alignment-sse", where=NOT_KVM
    fault "movaps", GP, 0, movaps FRAMES+8, %xmm0
    fault "movaps-store", GP, 0, movaps %xmm0, FRAMES+4
    fault "addps", GP, 0, addps FRAMES+1, %xmm0
    fault "movups", NONE, 0, movups FRAMES+1, %xmm0
    finish

# The rig's processor has no alignment check.
    case "alignment-check", where=NOT_KVM
    set_bits %cr0, CR0_AM
    user "off", NONE, 0, movl USER+FRAMES+1, %eax
    movq $FLAG_AC | 2, user_flags-org
    user "dword", AC, 0, movl USER+FRAMES+1, %eax
    user "word", AC, 0, movw %ax, USER+FRAMES+1
    user "quad", AC, 0, movq USER+FRAMES+4, %rax
    user "aligned", NONE, 0, movq USER+FRAMES+8, %rax
    user "byte", NONE, 0, movb USER+FRAMES+1, %al
    clear_bits %cr0, CR0_AM
    user "am-off", NONE, 0, movl USER+FRAMES+1, %eax
    finish

    case "registers"
    movl $0x12345678, %ecx
    fault "rdmsr-unknown", GP, 0, rdmsr
    fault "wrmsr-unknown", GP, 0, wrmsr
    movl $MSR_EFER, %ecx
    rdmsr
    movl %eax, %esi
    movl %edx, %edi
    andl $~0x100, %eax
    fault "efer-lme-off", GP, 0, wrmsr
    movl %esi, %eax
    orl $2, %eax
    fault "efer-reserved", GP, 0, wrmsr
    movl %esi, %eax
    andl $~0x400, %eax
    fault "efer-lma-ignored", NONE, 0, wrmsr
    rdmsr
    andl $0xd01, %eax
    check "efer", %rax, 0xd01
    movq %cr0, %rbx
    movq %rbx, %rax
    andl $~CR0_PE, %eax
    fault "cr0-pg-without-pe", GP, 0, movq %rax, %cr0
    movq %rbx, %rax
    orl $1 << 29, %eax
    fault "cr0-nw-without-cd", GP, 0, movq %rax, %cr0
    movq %cr0, %rax
    check_same "cr0-kept", %rax, %rbx
    movq %cr4, %rbx
    movq %rbx, %rax
    andl $~CR4_PAE, %eax
    fault "cr4-pae-off", GP, 0, movq %rax, %cr4
    movq %rbx, %rax
    orl $1 << 15, %eax
    fault "cr4-reserved", GP, 0, movq %rax, %cr4
    movq %cr4, %rax
    check_same "cr4-kept", %rax, %rbx
    movl $0x3b, %eax
    lmsw %ax
    movq %cr0, %rax
    andl $0xe, %eax
    check "lmsw", %rax, 0xa
    # LMSW cannot clear PE, and changes TS, EM and MP.
    movl $2, %eax
    lmsw %ax
    smsw %eax
    andl $0xf, %eax
    check "lmsw-keeps-pe", %rax, 3
    movabsq $0x123456789abcdef0, %rbx
    fault "mov-cr2", NONE, 0, movq %rbx, %cr2
    movq %cr2, %rax
    check "cr2", %rax, 0x123456789abcdef0
    finish

# The rig's processor drops these bits, and enters no guest with such a CR3.
    case "registers-high", where=NOT_KVM
    movabsq $1 << 32, %rax
    movq %cr0, %rbx
    orq %rbx, %rax
    fault "cr0", GP, 0, movq %rax, %cr0
    movabsq $1 << 63, %rax
    movq %cr4, %rbx
    orq %rbx, %rax
    fault "cr4", GP, 0, movq %rax, %cr4
    movabsq $1 << 62, %rax
    orq $PML4, %rax
    fault "cr3", GP, 0, movq %rax, %cr3
    movq %cr3, %rax
    check "cr3-kept", %rax, PML4
    movl $0x10, %eax
    fault "cr8", GP, 0, movq %rax, %cr8
    movabsq $1 << 32, %rax
    fault "dr7", GP, 0, movq %rax, %dr7
    finish

# Segment bases, SWAPGS.
    case "bases"
    write_msr MSR_FS_BASE, FRAMES
    write_msr MSR_GS_BASE, FRAMES + 0x100
    write_msr MSR_KERNEL_GS_BASE, 0xffff800000000123
    movl $0x11, FRAMES + 8
    movl $0x22, FRAMES + 0x108
    movl %fs:8, %eax
    check "fs", %rax, 0x11
    movl %gs:8, %eax
    check "gs", %rax, 0x22
    swapgs
    movl $MSR_GS_BASE, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    check "swapgs-gs", %rax, 0xffff800000000123
    movl $MSR_KERNEL_GS_BASE, %ecx
    rdmsr
    check "swapgs-kernel", %rax, FRAMES + 0x100
    swapgs
    # Bases of DS, ES and SS count for nothing in 64-bit code; loading FS loads a 32-bit base.
    set_entry spare-org, 0x00cf93100000ffff
    movl $SPARE, %eax
    movl %eax, %fs
    movl %eax, %ds
    movl %fs:8, %eax
    check "fs-from-descriptor", %rax, 0x11
    movl $0x33, FRAMES + 0x10
    movl FRAMES + 0x10, %eax
    check "ds-base-ignored", %rax, 0x33
    movl $MSR_FS_BASE, %ecx
    rdmsr
    check "fs-base-msr", %rax, FRAMES
    check "fs-base-msr-high", %rdx, 0
    # A 32-bit address is added to the base without a wrap at 4 GiB.
    write_msr MSR_FS_BASE, FRAMES - 0xfffffff0
    movl $0xfffffff8, %ebx
    movl %fs:(%ebx), %eax
    check "base-and-32-bit-address", %rax, 0x11
    finish

    case "debug"
    movl $0xffff0ff0, %eax
    movq %rax, %dr6
    movq %dr6, %rax
    check "dr6", %rax, 0xffff0ff0
    movq %dr7, %rax
    check "dr7", %rax, 0x400
    # The first trap comes after the instruction that follows POPF.
    pushfq
    orq $FLAG_TF, (%rsp)
    recover_at 1f
    popfq
    nop
2:  nop
    call no_exception
1:  check_exception "single-step", DB, 0, 2b-org
    movq %dr6, %rax
    check "single-step-dr6", %rax, 0xffff4ff0
    movq last_flags-org, %rax
    check "single-step-flags", %rax, FLAG_TF | 2
    movq handler_flags-org, %rax
    check "single-step-handler-flags", %rax, 2
    movl $0xffff0ff0, %eax
    movq %rax, %dr6
    # A taken jump is one step, and so is each iteration of a repeated instruction.
    pushfq
    orq $FLAG_TF, (%rsp)
    recover_at 1f
    popfq
    jmp 2f
    nop
2:  nop
    call no_exception
1:  check_exception "step-jump", DB, 0, 2b-org
    movl $FRAMES, %edi
    movl $5, %ecx
    pushfq
    orq $FLAG_TF, (%rsp)
    recover_at 1f
    popfq
2:  rep stosb
    call no_exception
1:  check_exception "step-repeat", DB, 0, 2b-org
    check "step-repeat-rcx", last_registers-org+8, 4
    set_bits %cr4, 8
    fault "dr4-with-de", UD, 0, movq %dr4, %rcx
    clear_bits %cr4, 8
    finish

# Segment prefixes count for FS and GS only. The rig's processor adds the base of DS.
    case "bases-prefixed", where=NOT_KVM
    set_entry spare-org, 0x00cf93100000ffff
    movl $SPARE, %eax
    movl %eax, %ds
    movl $0x33, FRAMES + 0x10
    movl $FRAMES, %ebx
    movl %ds:0x10(%rbx), %eax
    check "ds", %rax, 0x33
    finish

# The rig's processor does not look at DR7.GD, and its MOV SS does not delay a trap. Breakpoints are
# left out: the software CPU keeps their registers, but never looks for them.
    case "debug-more", where=NOT_KVM
    # DR7.GD forbids access to debug registers.
    movl $0xffff0ff0, %eax
    movq %rax, %dr6
    movl $0x2400, %eax
    movq %rax, %dr7
    fault "general-detect", DB, 0, movq %dr0, %rcx
    # The exception itself has cleared GD.
    movq %dr7, %rax
    check "general-detect-dr7", %rax, 0x400
    movq %dr6, %rax
    andl $0x2000, %eax
    check "general-detect-dr6", %rax, 0x2000
    # A trap waits for the instruction after MOV SS.
    movl $0xffff0ff0, %eax
    movq %rax, %dr6
    movl $DATA, %eax
    pushfq
    orq $FLAG_TF, (%rsp)
    recover_at 1f
    popfq
    movl %eax, %ss
    nop
2:  nop
    call no_exception
1:  check_exception "step-mov-ss", DB, 0, 2b-org
    finish
