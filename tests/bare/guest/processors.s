# Several CPUs: start-up, interrupts between them, atomic instructions, translations and code that
# another CPU changes.

# What a CPU has after INIT and a start-up interrupt.
    case "start-up", cpus=2
    start_processors 1
    .macro check_start name, offset, want, mask=0xffffffff
    movl start_registers-org + \offset, %eax
    andl $\mask, %eax
    check "\name", %rax, \want
    .endm
    check_start "eax", 0, 0
    check_start "ebx", 4, 0
    check_start "ecx", 8, 0
    check_start "esp", 12, 0
    check_start "ebp", 16, 0
    check_start "esi", 20, 0
    check_start "edi", 24, 0
    check_start "cs", 28, IMAGE >> 4, 0xffff
    check_start "ds", 28, 0, 0xffff0000
    check_start "ss", 32, 0, 0xffff
    # CD and NW depend on what they were.
    check_start "cr0", 36, 0x10, 0x9fffffff
    check_start "cr4", 40, 0
    check_start "dr6", 44, 0xffff0ff0
    check_start "dr7", 48, 0x400
    check_start "idt-limit", 52, 0xffff, 0xffff
    movl start_registers-org + 54, %eax
    check "idt-base", %rax, 0
    check_start "eflags", 60, 2
    check_start "efer", 64, 0
    give_work 1, 1f
    wait_for processors_done, 1
    check "apic-id", FRAMES, 0x01000000
    check "apic-base", FRAMES + 8, APIC | 0x800
    check "cpuid", FRAMES + 16, 1
    finish
1:  movl $APIC, %eax
    movl APIC_ID(%rax), %eax
    movq %rax, FRAMES
    movl $MSR_APIC_BASE, %ecx
    rdmsr
    movq %rax, FRAMES + 8
    movl $0xb, %eax
    xorl %ecx, %ecx
    cpuid
    movq %rdx, FRAMES + 16
    ret

# A CPU that runs is stopped by INIT and starts again; a start-up interrupt alone does nothing.
    case "start-up-again", cpus=2
    start_processors 1
    give_work 1, 1f
    wait_for progress, 1000
    apic_write APIC_ICR, $0xc4600 | START_VECTOR
    movl progress-org, %eax
    addl $1000, %eax
2:  pause
    cmpl progress-org, %eax
    ja 2b
    check "start-up-ignored", processors_started-org, 1
    apic_write APIC_ICR2, $1 << 24
    apic_write APIC_ICR, $0x4500
    # It may take its time; if it never stops the case does not end.
2:  movl progress-org, %ebx
    wait_cycles 20000000
    cmpl progress-org, %ebx
    jne 2b
    check "not-started", processors_started-org, 1
    apic_write APIC_ICR, $0x4600 | START_VECTOR
    wait_for processors_started, 2
    give_work 1, 3f
    wait_for processors_done, 1
    check "works", FRAMES, 1
    finish
1:  incl progress-org
    pause
    jmp 1b
3:  movl $1, FRAMES
    ret
    .balign 8
progress: .quad 0

# Each CPU counts its interrupts, by vector. Vectors are 0xa0 to 0xaf.
    .balign 8
arrivals: .fill 4 * 16, 4, 0        # [cpu][vector - 0xa0]
.macro count_handler vector
    .balign 16
count_\vector:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    shll $4, %ebx
    lock incl arrivals-org + 4 * (\vector - 0xa0)(, %rbx, 4)
    cmpl $0, in_x2apic-org
    jne 1f
    apic_write APIC_EOI, $0
    jmp 2f
1:  write_msr X2APIC + 0xb, 0
2:  popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    iretq
.endm
    .irp vector, 0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7
    count_handler \vector
    .endr
    .balign 8
in_x2apic: .quad 0

.macro count_gates
    .irp vector, 0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7
    gate \vector, count_\vector
    .endr
.endm

# Which CPUs have got a vector, a digit for each (CPU 0 is the last), once so many have come.
.macro check_arrivals name, vector, total, want
.Lagain\@:
    pause
    movl arrivals-org + 4 * (\vector - 0xa0), %eax
    addl arrivals-org + 4 * (\vector - 0xa0) + 64, %eax
    addl arrivals-org + 4 * (\vector - 0xa0) + 128, %eax
    addl arrivals-org + 4 * (\vector - 0xa0) + 192, %eax
    cmpl $\total, %eax
    jb .Lagain\@
    wait_cycles 300000
    movl arrivals-org + 4 * (\vector - 0xa0) + 192, %eax
    shll $4, %eax
    addl arrivals-org + 4 * (\vector - 0xa0) + 128, %eax
    shll $4, %eax
    addl arrivals-org + 4 * (\vector - 0xa0) + 64, %eax
    shll $4, %eax
    addl arrivals-org + 4 * (\vector - 0xa0), %eax
    check "\name", %rax, \want
.endm

enable_interrupts:
    sti
    ret

    case "ipi", cpus=4
    count_gates
    start_processors 3
    give_work 3, enable_interrupts
    wait_for processors_done, 3
    sti
    apic_write APIC_ICR, $0x440a0
    check_arrivals "self", 0xa0, 1, 0x0001
    apic_write APIC_ICR, $0x840a1
    check_arrivals "all", 0xa1, 4, 0x1111
    apic_write APIC_ICR, $0xc40a2
    check_arrivals "others", 0xa2, 3, 0x1110
    apic_write APIC_ICR2, $2 << 24
    apic_write APIC_ICR, $0x40a3
    check_arrivals "physical", 0xa3, 1, 0x0100
    apic_write APIC_ICR2, $0
    apic_write APIC_ICR, $0x40a4
    check_arrivals "physical-self", 0xa4, 1, 0x0001
    apic_write APIC_ICR2, $0xff000000
    apic_write APIC_ICR, $0x40a5
    check_arrivals "physical-all", 0xa5, 4, 0x1111
    # Nobody there.
    apic_write APIC_ICR2, $9 << 24
    apic_write APIC_ICR, $0x40a5
    # One CPU sends to another.
    give_work 3, 1f
    wait_for processors_done, 3
    check_arrivals "sent-by-others", 0xa6, 3, 0x0003
    check_arrivals "nobody", 0xa5, 4, 0x1111
    finish
    # Interrupts of one vector that wait together are one, so each waits for the one before.
1:  pause
    movl arrivals-org + 4 * 6, %eax
    incl %eax
    cmpl %eax, %r15d
    ja 1b
    apic_write APIC_ICR2, $0
    apic_write APIC_ICR, $0x40a6
    ret

# Logical destinations, in both formats; each CPU has the bit of its number.
    case "ipi-logical", cpus=4
    count_gates
    start_processors 3
    give_work 3, 1f
    wait_for processors_done, 3
    xorl %r15d, %r15d
    call 1f
    apic_write APIC_ICR2, $0x0a000000
    apic_write APIC_ICR, $0x48a0
    check_arrivals "flat-1-3", 0xa0, 2, 0x1010
    apic_write APIC_ICR2, $0x01000000
    apic_write APIC_ICR, $0x48a1
    check_arrivals "flat-0", 0xa1, 1, 0x0001
    apic_write APIC_ICR2, $0xff000000
    apic_write APIC_ICR, $0x48a2
    check_arrivals "flat-all", 0xa2, 4, 0x1111
    # Clusters of two.
    give_work 3, 2f
    wait_for processors_done, 3
    xorl %r15d, %r15d
    call 2f
    apic_write APIC_ICR2, $0x13000000
    apic_write APIC_ICR, $0x48a3
    check_arrivals "cluster-1-all", 0xa3, 2, 0x1100
    apic_write APIC_ICR2, $0x02000000
    apic_write APIC_ICR, $0x48a4
    check_arrivals "cluster-0-second", 0xa4, 1, 0x0010
    apic_write APIC_ICR2, $0x0f000000
    apic_write APIC_ICR, $0x48a5
    check_arrivals "cluster-0-all", 0xa5, 2, 0x0011
    finish
1:  movl $1, %eax
    movl %r15d, %ecx
    shll %cl, %eax
    shll $24, %eax
    apic_write APIC_LDR, %eax
    apic_write APIC_DFR, $0xffffffff
    sti
    ret
2:  movl %r15d, %ecx
    andl $1, %ecx
    movl $1, %eax
    shll %cl, %eax
    movl %r15d, %edx
    shrl $1, %edx
    shll $4, %edx
    orl %edx, %eax
    shll $24, %eax
    apic_write APIC_DFR, $0x0fffffff
    apic_write APIC_LDR, %eax
    ret

    case "ipi-x2apic", cpus=4
    need 1, 0, %ecx, 21
    count_gates
    start_processors 3
    give_work 3, 1f
    wait_for processors_done, 3
    movl $1, in_x2apic-org
    x2apic_on
    sti
    .macro command destination, low
    movl $X2APIC + 0x30, %ecx
    movl $\low, %eax
    movl $\destination, %edx
    wrmsr
    .endm
    command 0, 0x840a0
    check_arrivals "all", 0xa0, 4, 0x1111
    command 0, 0xc40a1
    check_arrivals "others", 0xa1, 3, 0x1110
    command 3, 0x40a2
    check_arrivals "physical", 0xa2, 1, 0x1000
    command 0xffffffff, 0x40a3
    check_arrivals "physical-all", 0xa3, 4, 0x1111
    command 6, 0x48a4
    check_arrivals "logical", 0xa4, 2, 0x0110
    command 0x1000f, 0x48a5
    command 0, 0x440a5
    check_arrivals "logical-other-cluster", 0xa5, 1, 0x0001
    finish
1:  x2apic_on
    sti
    ret

# NMI and INIT reach a CPU that is halted with interrupts off; others do not.
    case "halted", cpus=2
    count_gates
    gate NMI, .Lnmi_at_hlt
    start_processors 1
    give_work 1, 1f
    wait_for halted, 1
    wait_cycles 300000
    apic_write APIC_ICR2, $1 << 24
    apic_write APIC_ICR, $0x40a0
    wait_cycles 10000000
    check "interrupt", awake-org, 0
    # Again and again, for the CPU may not have come to its HLT yet.
2:  apic_write APIC_ICR, $0x4400
    wait_cycles 1000000
    cmpl $0, awake-org
    je 2b
    check_address "nmi-rip", woken_rip-org, .Lbehind_hlt-org
    # The interrupt that waited.
    wait_for processors_done, 1
    check_arrivals "interrupt-waited", 0xa0, 1, 0x0010
    give_work 1, 3f
    wait_for halted, 2
    wait_cycles 300000
    apic_write APIC_ICR2, $1 << 24
    apic_write APIC_ICR, $0x4500
    wait_cycles 300000
    apic_write APIC_ICR, $0x4600 | START_VECTOR
    wait_for processors_started, 2
    check "init", awake-org, 1
    finish
1:  cli
    incl halted-org
    hlt
.Lbehind_hlt:
    incl awake-org
    sti
    nop
    cli
    ret
.Lnmi_at_hlt:
    cmpq $.Lbehind_hlt-org, (%rsp)
    jne 2f
    movq $.Lbehind_hlt-org, woken_rip-org
2:  iretq
3:  cli
    incl halted-org
    hlt
    incl awake-org
    ret
    .balign 8
halted: .quad 0
awake: .quad 0
woken_rip: .quad 0

# Four CPUs change the same memory at the same time.
    .set TIMES, 4000
.macro together name, want, label, got=FRAMES
    movq $0, FRAMES
    movq $0, FRAMES + 8
    movl $0, arrived-org
    give_work 3, \label
    call \label
    wait_for processors_done, 3
    check "\name", \got, \want
.endm
# Begins the loop that all four carry out; they begin at the same time.
.macro begin_together
    lock incl arrived-org
    wait_for arrived, 4
    movl $TIMES, %ecx
.endm

    case "atomic", cpus=4
    start_processors 3
    together "inc", 4 * TIMES, 1f
    together "xadd", 4 * TIMES, 2f
    together "sub-byte", 4 * TIMES & 0xff, 3f
    together "cmpxchg", 4 * TIMES, 4f
    together "cmpxchg8b", 4 * TIMES, 5f
    together "xchg-lock", 4 * TIMES, 7f, FRAMES + 8
    together "bts-lock", 4 * TIMES, 8f, FRAMES + 8
    # Over the end of a cache line, and of a page.
    movq $0, FRAMES + 0x103e
    together "line-crossing", 4 * TIMES, 9f, FRAMES + 0x103e
    movq $0, FRAMES + 0x1ffd
    together "page-crossing", 4 * TIMES, 10f, FRAMES + 0x1ffd
    # Each CPU another part of the same 8 bytes.
    together "neighbours", TIMES * 0x0001000100010001, 11f
    finish
1:  begin_together
12: lock incq FRAMES
    decl %ecx
    jnz 12b
    ret
2:  begin_together
12: movl $1, %eax
    lock xaddq %rax, FRAMES
    decl %ecx
    jnz 12b
    ret
3:  begin_together
12: lock subb $-1, FRAMES
    decl %ecx
    jnz 12b
    ret
4:  begin_together
12: movl FRAMES, %eax
13: leal 1(%rax), %edx
    lock cmpxchgl %edx, FRAMES
    jne 13b
    decl %ecx
    jnz 12b
    ret
5:  begin_together
    movl %ecx, %esi
12: movl FRAMES, %eax
    movl FRAMES + 4, %edx
13: movl %eax, %ebx
    movl %edx, %ecx
    addl $1, %ebx
    adcl $0, %ecx
    lock cmpxchg8b FRAMES
    jne 13b
    decl %esi
    jnz 12b
    ret
7:  begin_together
12: movl $1, %eax
13: pause
    xchgl %eax, FRAMES
    testl %eax, %eax
    jnz 13b
    incq FRAMES + 8
    movl $0, FRAMES
    decl %ecx
    jnz 12b
    ret
8:  begin_together
12: pause
    lock btsl $5, FRAMES
    jc 12b
    incq FRAMES + 8
    lock btrl $5, FRAMES
    decl %ecx
    jnz 12b
    ret
9:  begin_together
12: lock incl FRAMES + 0x103e
    decl %ecx
    jnz 12b
    ret
10: begin_together
12: lock incl FRAMES + 0x1ffd
    decl %ecx
    jnz 12b
    ret
11: movl $1, %eax
    cpuid
    shrl $24, %ebx
    begin_together
12: incw FRAMES(, %rbx, 2)
    decl %ecx
    jnz 12b
    ret

    case "atomic-16", cpus=4
    need 1, 0, %ecx, 13
    start_processors 3
    together "low", 4 * TIMES, 6f
    together "high", 4 * TIMES * 3, 6f, FRAMES + 8
    finish
6:  begin_together
    movl %ecx, %esi
12: movq FRAMES, %rax
    movq FRAMES + 8, %rdx
13: leaq 1(%rax), %rbx
    leaq 3(%rdx), %rcx
    lock cmpxchg16b FRAMES
    jne 13b
    decl %esi
    jnz 12b
    ret
    .balign 8
arrived: .quad 0

# Order of memory accesses: Peterson's lock needs a fence, a message needs none. Where the two CPUs
# have to take turns on one, each hand-over costs a time slice.
    .set HANDOVERS, 500

    case "order", cpus=2
    start_processors 1
    movl $0, arrived-org
    give_work 1, 1f
    xorl %r15d, %r15d
    call 1f
    wait_for processors_done, 1
    check "peterson", peterson_count-org, 2 * HANDOVERS
    movl $0, arrived-org
    give_work 1, 2f
    call 3f
    wait_for processors_done, 1
    check "message", message_wrong-org, 0
    finish
1:  lock incl arrived-org
    wait_for arrived, 2
    movl $HANDOVERS, %ecx
    movl %r15d, %esi
    movl %r15d, %edi
    xorl $1, %edi
4:  movl $1, peterson_want-org(, %rsi, 4)
    movl %edi, peterson_turn-org
    mfence
5:  pause
    cmpl $0, peterson_want-org(, %rdi, 4)
    je 6f
    cmpl %edi, peterson_turn-org
    je 5b
6:  incq peterson_count-org
    movl $0, peterson_want-org(, %rsi, 4)
    decl %ecx
    jnz 4b
    ret
    # CPU 1 sends, CPU 0 receives.
2:  movl $HANDOVERS, %ecx
4:  movl %ecx, message_data-org
    movl %ecx, message_ready-org
5:  pause
    cmpl $0, message_ready-org
    jne 5b
    decl %ecx
    jnz 4b
    ret
3:  movl $HANDOVERS, %ecx
4:  pause
    movl message_ready-org, %eax
    movl message_data-org, %edx
    testl %eax, %eax
    jz 4b
    cmpl %eax, %edx
    je 5f
    incl message_wrong-org
5:  movl $0, message_ready-org
    decl %ecx
    jnz 4b
    ret
    .balign 64
peterson_want: .fill 16, 4, 0
peterson_turn: .fill 16, 4, 0
peterson_count: .fill 16, 4, 0
message_data: .fill 16, 4, 0
message_ready: .fill 16, 4, 0
message_wrong: .quad 0

# A translation that one CPU changes is gone on all after they have been asked to drop it.
    case "shootdown", cpus=4
    gate 0xb0, 8f
    movl $0x11, FRAME0
    movl $0x22, FRAME1
    map_test 0, FRAME0 | RW
    start_processors 3
    give_work 3, 1f
    wait_for shoot_ready, 3
    movl $10, %ebp
2:  movl $0, shoot_acknowledged-org
    xorl $FRAME0 ^ FRAME1, PT_TEST
    invlpg PAGE0
    apic_write APIC_ICR, $0xc40b0
    wait_for shoot_acknowledged, 3
    # From now on everybody must read the other frame.
    movl PAGE0, %eax
    movl $0, shoot_compared-org
    movl %eax, shoot_expected-org
    wait_for shoot_compared, 3
    decl %ebp
    jnz 2b
    movl $-1, shoot_expected-org
    wait_for processors_done, 3
    check "rounds", shoot_compared-org, 3
    check "stale", shoot_stale-org, 0
    check "read", %rax, 0x11
    finish
1:  sti
    movl PAGE0, %edx                # the translation is cached
    lock incl shoot_ready-org
    movl $0, %esi                   # the value compared with last
3:  pause
    movl PAGE0, %edx
    movl shoot_expected-org, %ecx
    cmpl $-1, %ecx
    je 5f
    cmpl %ecx, %esi
    je 3b
    movl %ecx, %esi
    cmpl PAGE0, %ecx
    je 4f
    lock incl shoot_stale-org
4:  lock incl shoot_compared-org
    jmp 3b
5:  cli
    ret
8:  invlpg PAGE0
    apic_write APIC_EOI, $0
    lock incl shoot_acknowledged-org
    iretq
    .balign 8
shoot_ready: .quad 0
shoot_acknowledged: .quad 0
shoot_compared: .quad 0
shoot_expected: .quad 0
shoot_stale: .quad 0

# Code that another CPU changes, while this one is in an interrupt: IRET serializes.
    case "cross-modifying", cpus=2
    gate 0xb1, 8f
    # mov eax, 0; ret
    movl $0xb8, FRAMES
    movl $0xc300, FRAMES + 4
    start_processors 1
    give_work 1, 1f
    wait_for cross_calls, 10
    movl $1, %ebp
2:  movl $0, cross_stopped-org
    movl $0, cross_go-org
    apic_write APIC_ICR2, $1 << 24
    apic_write APIC_ICR, $0x40b1
    wait_for cross_stopped, 1
    movl %ebp, FRAMES + 1
    movl %ebp, cross_expected-org
    movl $1, cross_go-org
    movl cross_calls-org, %eax
    addl $3, %eax
3:  pause
    cmpl cross_calls-org, %eax
    ja 3b
    incl %ebp
    cmpl $50, %ebp
    jbe 2b
    movl $1, cross_end-org
    wait_for processors_done, 1
    check "wrong", cross_wrong-org, 0
    movl $FRAMES, %edx
    cpuid
    movl $FRAMES, %edx
    call *%rdx
    check "here", %rax, 50
    finish
1:  sti
    nop
3:  cli
    movl $FRAMES, %edx
    call *%rdx
    cmpl %eax, cross_expected-org
    je 4f
    incl cross_wrong-org
4:  incl cross_calls-org
    sti
    nop
    cmpl $0, cross_end-org
    je 3b
    cli
    ret
8:  movl $1, cross_stopped-org
9:  pause
    cmpl $0, cross_go-org
    je 9b
    apic_write APIC_EOI, $0
    iretq
    .balign 8
cross_calls: .quad 0
cross_stopped: .quad 0
cross_go: .quad 0
cross_expected: .quad 0
cross_end: .quad 0
cross_wrong: .quad 0
