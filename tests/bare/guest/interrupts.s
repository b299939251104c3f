# Interrupts of one CPU: local APIC, priorities, shadows, NMI, timers.

# Handlers append their vectors to a log, whose first byte is the first.
.macro log_handler vector
    .balign 16
log_\vector:
    pushq %rax
    movl log_count-org, %eax
    movb $\vector, log_vectors-org(%rax)
    incl log_count-org
    movq 8(%rsp), %rax
    movq %rax, log_rip-org
    apic_write APIC_EOI, $0
    popq %rax
    iretq
.endm
    .irp vector, 0x40, 0x41, 0x42, 0x51, 0x52, 0x61, 0x71
    log_handler \vector
    .endr
    .balign 8
log_vectors: .quad 0
log_count: .quad 0
log_rip: .quad 0

.macro log_gates
    .irp vector, 0x40, 0x41, 0x42, 0x51, 0x52, 0x61, 0x71
    gate \vector, log_\vector
    .endr
    movq $0, log_vectors-org
    movq $0, log_count-org
.endm

# Sends an interrupt to this CPU.
.macro send_self vector
    apic_write APIC_ICR, $0x44000 | \vector
.endm

.macro check_apic name, register, want, mask=0xffffffff
    movl $APIC, %eax
    movl \register(%rax), %eax
    andl $\mask, %eax
    check "\name", %rax, \want
.endm

    case "apic-registers"
    movl $MSR_APIC_BASE, %ecx
    rdmsr
    check "base", %rax, APIC | 0x900
    check "base-high", %rdx, 0
    check_apic "id", APIC_ID, 0
    check_apic "version", APIC_VERSION, 0x10, 0xf0
    check_apic "spurious-at-reset", APIC_SVR, 0xff
    check_apic "timer-at-reset", APIC_TIMER, 0x10000
    check_apic "format-at-reset", APIC_DFR, 0xffffffff
    check_apic "tpr-at-reset", APIC_TPR, 0
    # While the APIC is disabled by software all local vectors stay masked.
    apic_write APIC_TIMER, $0x40
    check_apic "timer-disabled", APIC_TIMER, 0x10040
    apic_write APIC_SVR, $0x1ff
    check_apic "spurious", APIC_SVR, 0x1ff
    apic_write APIC_TIMER, $0x40
    check_apic "timer-enabled", APIC_TIMER, 0x40
    apic_write APIC_SVR, $0xff
    check_apic "timer-masked", APIC_TIMER, 0x10040
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_LDR, $0xffffffff
    check_apic "logical", APIC_LDR, 0xff000000
    apic_write APIC_DFR, $0x0fffffff
    check_apic "format", APIC_DFR, 0x0fffffff
    # KVM keeps only the half of TPR that CR8 has.
    apic_write APIC_TPR, $0x30
    check_apic "tpr", APIC_TPR, 0x30
    check_apic "ppr", APIC_PPR, 0x30
    apic_write APIC_DIVIDE, $0xffffffff
    check_apic "divide", APIC_DIVIDE, 0xb
    apic_write APIC_ICR2, $0xffffffff
    check_apic "destination", APIC_ICR2, 0xff000000
    finish

    case "apic-priority"
    log_gates
    apic_write APIC_SVR, $0x1ff
    send_self 0x41
    send_self 0x51
    send_self 0x42
    send_self 0x51                  # already requested: one interrupt
    check_apic "requested", APIC_IRR + 0x20, 1 << 17 | 1 << 2 | 1 << 1
    check_apic "requested-others", APIC_IRR + 0x30, 0
    check_apic "trigger-mode", APIC_TMR + 0x20, 0
    sti
    nop
    wait_for log_count, 3
    cli
    check "order", log_vectors-org, 0x414251
    check_apic "requested-after", APIC_IRR + 0x20, 0
    check_apic "in-service-after", APIC_ISR + 0x20, 0
    # A handler that lets interrupts in is interrupted by a higher class only.
    movq $0, log_vectors-org
    movq $0, log_count-org
    gate 0x50, 1f
    send_self 0x50
    sti
    nop
    wait_for log_count, 4
    cli
    check "nested-order", log_vectors-org, 0x51525061
    jmp 2f
1:  pushq %rax
    check_apic "in-service", APIC_ISR + 0x20, 1 << 16
    check_apic "in-service-ppr", APIC_PPR, 0x50
    send_self 0x51
    send_self 0x61
    send_self 0x52
    sti
    nop
    wait_for log_count, 1
    wait_cycles 100000
    cli
    movl log_count-org, %eax
    movb $0x50, log_vectors-org(%rax)
    incl log_count-org
    apic_write APIC_EOI, $0
    popq %rax
    iretq
2:  finish

    case "apic-tpr"
    log_gates
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_TPR, $0x50
    send_self 0x41
    send_self 0x51
    send_self 0x61
    sti
    nop
    wait_for log_count, 1
    wait_cycles 100000
    check "above-class-5", log_vectors-org, 0x61
    check_apic "ppr", APIC_PPR, 0x50
    apic_write APIC_TPR, $0x4f
    wait_for log_count, 2
    wait_cycles 100000
    check "class-5", log_vectors-org, 0x5161
    apic_write APIC_TPR, $0
    wait_for log_count, 3
    check "all", log_vectors-org, 0x415161
    cli
    finish

# CR8 is the upper half of the TPR. QEMU 7.2 aborts when a nested guest writes it.
    case "cr8", where=NOT_KVM
    log_gates
    apic_write APIC_SVR, $0x1ff
    movl $5, %eax
    movq %rax, %cr8
    check_apic "tpr", APIC_TPR, 0x50
    apic_write APIC_TPR, $0x6f
    movq %cr8, %rax
    check "cr8", %rax, 6
    movl $5, %eax
    movq %rax, %cr8
    send_self 0x51
    send_self 0x61
    sti
    nop
    wait_for log_count, 1
    wait_cycles 100000
    check "above", log_vectors-org, 0x61
    xorl %eax, %eax
    movq %rax, %cr8
    wait_for log_count, 2
    check "all", log_vectors-org, 0x5161
    cli
    movl $0x10, %eax
    fault "reserved", GP, 0, movq %rax, %cr8
    finish

# An interrupt waits; where is it taken?
    case "interrupt-shadow"
    log_gates
    apic_write APIC_SVR, $0x1ff
    send_self 0x40
    wait_cycles 100000
    sti
    cli
    check "sti-cli", log_count-org, 0
    sti
    nop
1:  cli
    check "sti-nop", log_count-org, 1
    check_address "sti-nop-rip", log_rip-org, 1b-org
    send_self 0x40
    wait_cycles 100000
    pushq $FLAG_IF
    popfq
1:  cli
    check "popf", log_count-org, 2
    check_address "popf-rip", log_rip-org, 1b-org
    send_self 0x40
    wait_cycles 100000
    movq %rsp, %rax
    pushq $DATA
    pushq %rax
    pushq $FLAG_IF | 2
    pushq $CODE64
    pushq $1f-org
    iretq
1:  cli
    check "iret", log_count-org, 3
    check_address "iret-rip", log_rip-org, 1b-org
    send_self 0x40
    wait_cycles 100000
    sti
    hlt
1:  cli
    check "sti-hlt", log_count-org, 4
    check_address "sti-hlt-rip", log_rip-org, 1b-org
    # At CPL 3.
    send_self 0x50
    wait_cycles 100000
    movq $FLAG_IF | 2, user_flags-org
    user "cpl-3", 0x50, 0, nop
    check "cpl-3-cs", last_cs-org, USER64
    check "cpl-3-handler-rsp", handler_rsp-org, STACK_RSP0
    movq last_flags-org, %rax
    check "cpl-3-flags", %rax, FLAG_IF | 2
    apic_write APIC_EOI, $0
    finish

# A repeated instruction is interrupted between two iterations, and goes on.
    case "interrupted-string"
    log_gates
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_DIVIDE, $0xb
    apic_write APIC_TIMER, $0x40
    movl $FRAMES, %edi
    movl $0x100000, %ecx
    movb $0x5a, %al
    apic_write APIC_INITIAL, $1000
    sti
    nop
1:  rep stosb
    cli
    check "rcx", %rcx, 0
    check "rdi", %rdi, FRAMES + 0x100000
    movzbl FRAMES + 0xfffff, %eax
    check "last", %rax, 0x5a
    finish

    case "nmi"
    apic_write APIC_SVR, $0x1ff
    gate NMI, nmi_handler
    call send_nmi
    wait_for nmi_count, 1
    wait_cycles 100000
    check "count", nmi_count-org, 1
    # One that is sent in the handler comes after IRET.
    movl $send_nmi-org, nmi_action-org
    call send_nmi
    wait_for nmi_count, 3
    wait_cycles 100000
    check "blocked-count", nmi_count-org, 3
    check "blocked-depth", nmi_deepest-org, 1
    # Of two that are sent in the handler one is kept.
    movl $1f-org, nmi_action-org
    call send_nmi
    wait_for nmi_count, 5
    wait_cycles 100000
    check "kept-count", nmi_count-org, 5
    jmp 2f
1:  call send_nmi
    wait_cycles 10000
    call send_nmi
    ret
2:  # IRET of anything ends the blocking.
    gate BP, plain_return
    movl $1f-org, nmi_action-org
    call send_nmi
    wait_for nmi_count, 7
    wait_cycles 100000
    check "unblocked-count", nmi_count-org, 7
    check "unblocked-depth", nmi_deepest-org, 2
    jmp 2f
1:  call send_nmi
    wait_cycles 10000
    int3
    wait_cycles 100000
    ret
2:  # With a stack of its own; the flags do not matter.
    gate NMI, stubs64 + 16 * NMI, 0x8e, 1
    recover_at 1f
    call send_nmi
    wait_cycles 100000
    call no_exception
1:  movq last_vector-org, %rax
    check "stub", %rax, NMI
    check "handler-rsp", handler_rsp-org, STACK_IST1
    finish
plain_return:
    iretq
send_nmi:
    apic_write APIC_ICR2, $0
    apic_write APIC_ICR, $0x4400
    ret
nmi_handler:
    pushq %rax
    incl nmi_count-org
    incl nmi_depth-org
    movl nmi_depth-org, %eax
    cmpl nmi_deepest-org, %eax
    jbe 1f
    movl %eax, nmi_deepest-org
1:  movl nmi_action-org, %eax
    movl $0, nmi_action-org
    testl %eax, %eax
    jz 1f
    call *%rax
    wait_cycles 100000
1:  decl nmi_depth-org
    popq %rax
    iretq
    .balign 8
nmi_count: .quad 0
nmi_depth: .quad 0
nmi_deepest: .quad 0
nmi_action: .quad 0

    case "timer-one-shot"
    log_gates
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_DIVIDE, $0xb
    apic_write APIC_TIMER, $0x40
    apic_write APIC_INITIAL, $10000
    check_apic "initial", APIC_INITIAL, 10000
1:  movl $APIC, %eax
    movl APIC_IRR + 0x20(%rax), %eax
    testl $1, %eax
    jz 1b
    check "requested", %rax, 1
    check_apic "trigger-mode", APIC_TMR + 0x20, 0
    sti
    nop
    wait_for log_count, 1
    wait_cycles 1000000
    cli
    check "vectors", log_vectors-org, 0x40
    check_apic "current", APIC_CURRENT, 0
    # Another divider, HLT. The count is large enough for the interrupt to find the CPU halted: one
    # that comes between STI and HLT is lost in the rig, once in a while. The timer is stopped first, because KVM starts an expired one again when
    # the divider changes.
    apic_write APIC_INITIAL, $0
    apic_write APIC_DIVIDE, $3      # by 16
    apic_write APIC_TIMER, $0x41
    apic_write APIC_INITIAL, $1000000
    sti
    hlt
    cli
    check "hlt", log_vectors-org, 0x4140
    # Stopped by an initial count of zero.
    apic_write APIC_TIMER, $0x41
    apic_write APIC_INITIAL, $0x10000000
    movl $APIC, %eax
    movl APIC_CURRENT(%rax), %eax
    cmpl $0x10000000, %eax
    setbe %bl
    testl %eax, %eax
    setnz %bh
    movzwl %bx, %eax
    check "running", %rax, 0x101
    apic_write APIC_INITIAL, $0
    check_apic "stopped", APIC_CURRENT, 0
    check_apic "stopped-requested", APIC_IRR + 0x20, 0
    # Masked: it counts, but does not interrupt.
    apic_write APIC_TIMER, $0x10042
    apic_write APIC_INITIAL, $5000
1:  movl $APIC, %eax
    movl APIC_CURRENT(%rax), %eax
    testl %eax, %eax
    jnz 1b
    wait_cycles 10000000
    check_apic "masked", APIC_IRR + 0x20, 0
    finish

    case "timer-periodic"
    log_gates
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_DIVIDE, $0xb
    apic_write APIC_TIMER, $0x20040
    apic_write APIC_INITIAL, $1000000
    sti
    nop
    wait_for log_count, 5
    cli
    apic_write APIC_INITIAL, $0
    sti
    nop
    nop
    cli
    movl log_count-org, %ebx
    wait_cycles 10000000
    check_apic "stopped", APIC_IRR + 0x20, 0
    check_apic "current", APIC_CURRENT, 0
    movabsq $0x4040404040, %rax
    movq log_vectors-org, %rcx
    andq %rax, %rcx
    check "vectors", %rcx, 0x4040404040
    finish

    case "timer-deadline"
    need 1, 0, %ecx, 24
    log_gates
    apic_write APIC_SVR, $0x1ff
    # In another mode the register reads as zero and drops what is written.
    apic_write APIC_TIMER, $0x40
    movl $MSR_TSC_DEADLINE, %ecx
    movl $1000, %eax
    xorl %edx, %edx
    wrmsr
    rdmsr
    check "other-mode", %rax, 0
    apic_write APIC_TIMER, $0x40040
    # The counter does nothing.
    apic_write APIC_INITIAL, $1000
    check_apic "current", APIC_CURRENT, 0
    rdtsc
    movl %eax, %esi
    addl $20000000, %eax
    adcl $0, %edx
    movl $MSR_TSC_DEADLINE, %ecx
    wrmsr
    sti
    hlt
    cli
    rdtsc
    subl %esi, %eax
    cmpl $20000000, %eax
    setae %al
    movzbl %al, %eax
    check "not-early", %rax, 1
    check "vectors", log_vectors-org, 0x40
    rdmsr
    check "register-after", %rax, 0
    # One in the past fires at once.
    movl $1, %eax
    xorl %edx, %edx
    wrmsr
    sti
    nop
    wait_for log_count, 2
    cli
    # Zero disarms.
    movl $0x7fffffff, %edx
    movl $0x12345678, %eax
    wrmsr
    rdmsr
    check "register-armed", %rax, 0x12345678
    check "register-armed-high", %rdx, 0x7fffffff
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    rdmsr
    check "register-disarmed", %rax, 0
    check_apic "disarmed", APIC_IRR + 0x20, 0
    finish

    .macro x2apic_on
    movl $MSR_APIC_BASE, %ecx
    rdmsr
    orl $0x400, %eax
    wrmsr
    .endm
    .set X2APIC, 0x800

    case "x2apic"
    need 1, 0, %ecx, 21
    log_gates
    movl $X2APIC + 2, %ecx
    fault "not-enabled", GP, 0, rdmsr
    x2apic_on
    rdmsr
    check "base", %rax, APIC | 0xd00
    movl $X2APIC + 2, %ecx
    rdmsr
    check "id", %rax, 0
    fault "write-id", GP, 0, wrmsr
    movl $X2APIC + 0xd, %ecx
    rdmsr
    check "logical", %rax, 1
    fault "write-logical", GP, 0, wrmsr
    movl $X2APIC + 0xe, %ecx
    fault "read-format", GP, 0, rdmsr
    movl $X2APIC + 0x31, %ecx
    fault "read-icr2", GP, 0, rdmsr
    write_msr X2APIC + 0xf, 0x1ff
    rdmsr
    check "spurious", %rax, 0x1ff
    write_msr X2APIC + 8, 0x20
    rdmsr
    check "tpr", %rax, 0x20
    write_msr X2APIC + 8, 0
    # Self-IPI, and the interrupt command as one register.
    write_msr X2APIC + 0x3f, 0x71
    gate 0x71, 1f
    movl $X2APIC + 0x23, %ecx
    rdmsr
    check "requested", %rax, 1 << 17
    sti
    nop
    wait_for log_count, 1
    cli
    check "vectors", log_vectors-org, 0x71
    write_msr X2APIC + 0x30, 0x4071
    sti
    nop
    wait_for log_count, 2
    cli
    write_msr X2APIC + 0x30, 0x44871
    sti
    nop
    wait_for log_count, 3
    cli
    movl $X2APIC + 0x30, %ecx
    rdmsr
    check "command", %rax, 0x44871
    movl $X2APIC + 0x3f, %ecx
    fault "read-self", GP, 0, rdmsr
    movl $X2APIC + 0xb, %ecx
    fault "read-eoi", GP, 0, rdmsr
    # Modes change in a circle only.
    movl $MSR_APIC_BASE, %ecx
    movl $APIC | 0x900, %eax
    xorl %edx, %edx
    fault "back-to-xapic", GP, 0, wrmsr
    movl $APIC | 0x500, %eax
    fault "extended-without-enabled", GP, 0, wrmsr
    movl $APIC | 0x100, %eax
    fault "disable", NONE, 0, wrmsr
    movl $APIC | 0xd00, %eax
    fault "disabled-to-x2apic", GP, 0, wrmsr
    movl $APIC | 0x900, %eax
    fault "enable", NONE, 0, wrmsr
    check_apic "id-after", APIC_ID, 0
    finish
1:  pushq %rax
    pushq %rcx
    pushq %rdx
    movl log_count-org, %eax
    movb $0x71, log_vectors-org(%rax)
    incl log_count-org
    write_msr X2APIC + 0xb, 0
    popq %rdx
    popq %rcx
    popq %rax
    iretq

# KVM ignores reserved bits.
    case "x2apic-reserved", where=NOT_KVM
    need 1, 0, %ecx, 21
    x2apic_on
    movl $X2APIC + 8, %ecx
    movl $0x100, %eax
    xorl %edx, %edx
    fault "tpr", GP, 0, wrmsr
    movl $X2APIC + 0xb, %ecx
    movl $1, %eax
    fault "eoi", GP, 0, wrmsr
    finish
