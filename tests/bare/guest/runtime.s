# Common part of all guests: descriptor tables, exception stubs, results.
#
# One image holds everything. It is copied to IMAGE in guest memory; `label - org` is the address
# of a label there, in every mode. Code that runs in 16-bit segments must lie below 64 KiB, so the
# files that have some come first.

    .set IMAGE, 0x1000
    .set RESULTS, 0x40000           # u32: number of records; records from RESULTS + 32
    .set RECORD, 24                 # name, kind (u32); value; expected value
    .set STACK, 0x52000             # top of CPU 0's stack; CPU n's lies n * 0x2000 above
    .set STACK_RSP0, 0x5e000        # top of the stack for interrupts out of CPL 3
    .set STACK_USER, 0x5f000        # top of the stack of CPL 3
    .set STACK_IST1, 0x5a800
    .set STACK_IST2, 0x5b000
    .set STACK_REAL, 0x1000         # real mode: segment 0
    .set PML4, 0x60000
    .set PT_LOW, 0x63000            # maps 0 to 2 MiB, identically, for CPL 0
    .set PT_USER, 0x65000           # maps the same at USER, for CPL 3
    .set PDPT, 0x61000
    .set PD_USER, 0x64000
    .set PT_TEST, 0x67000           # maps TEST to TEST + 2 MiB: empty
    .set SPARE_TABLES, 0x69000      # pages for more tables, up to 0x70000
    .set USER, 0x40000000
    .set TEST, 0x60000000
    .set PDE_TEST, PD_USER + 256 * 8
    .set TEST_LARGE, 0x60200000     # the next 2 MiB
    .set PDE_LARGE, PD_USER + 257 * 8
    .set TEST_HUGE, 0x80000000      # the next GiB, which fits no displacement
    .set PDPTE_HUGE, PDPT + 2 * 8
    .set FRAMES, 0x100000           # free memory, up to 0x1000000

    .set PRESENT, 1
    .set WRITE, 2
    .set FOR_USER, 4
    .set ACCESSED, 0x20
    .set DIRTY, 0x40
    .set LARGE, 0x80
    .set GLOBAL, 0x100
    .set NX, 1 << 63
    .set RW, PRESENT | WRITE
    .set URW, PRESENT | WRITE | FOR_USER

    .set CODE64, 0x08
    .set DATA, 0x10
    .set CODE32, 0x18
    .set CODE16, 0x20
    .set DATA16, 0x28
    .set USER32, 0x33
    .set USERDATA, 0x3b
    .set USER64, 0x43
    .set TSS, 0x48
    .set LDT, 0x58
    .set SPARE, 0x68                # first of 16 free descriptors

    .set APIC, 0xfee00000
    .set APIC_ID, 0x20
    .set APIC_VERSION, 0x30
    .set APIC_TPR, 0x80
    .set APIC_PPR, 0xa0
    .set APIC_EOI, 0xb0
    .set APIC_LDR, 0xd0
    .set APIC_DFR, 0xe0
    .set APIC_SVR, 0xf0
    .set APIC_ISR, 0x100
    .set APIC_TMR, 0x180
    .set APIC_IRR, 0x200
    .set APIC_ESR, 0x280
    .set APIC_ICR, 0x300
    .set APIC_ICR2, 0x310
    .set APIC_TIMER, 0x320
    .set APIC_LINT0, 0x350
    .set APIC_INITIAL, 0x380
    .set APIC_CURRENT, 0x390
    .set APIC_DIVIDE, 0x3e0

    .set MSR_APIC_BASE, 0x1b
    .set MSR_SYSENTER_CS, 0x174
    .set MSR_SYSENTER_ESP, 0x175
    .set MSR_SYSENTER_EIP, 0x176
    .set MSR_TSC_DEADLINE, 0x6e0
    .set MSR_EFER, 0xc0000080
    .set MSR_STAR, 0xc0000081
    .set MSR_LSTAR, 0xc0000082
    .set MSR_CSTAR, 0xc0000083
    .set MSR_SFMASK, 0xc0000084
    .set MSR_FS_BASE, 0xc0000100
    .set MSR_GS_BASE, 0xc0000101
    .set MSR_KERNEL_GS_BASE, 0xc0000102
    .set MSR_TSC_AUX, 0xc0000103

    .set CR0_PE, 1 << 0
    .set CR0_MP, 1 << 1
    .set CR0_TS, 1 << 3
    .set CR0_NE, 1 << 5
    .set CR0_WP, 1 << 16
    .set CR0_AM, 1 << 18
    .set CR0_PG, 1 << 31
    .set CR4_PSE, 1 << 4
    .set CR4_PAE, 1 << 5
    .set CR4_PGE, 1 << 7
    .set CR4_OSFXSR, 1 << 9
    .set CR4_OSXMMEXCPT, 1 << 10
    .set CR4_PCIDE, 1 << 17
    .set CR4_OSXSAVE, 1 << 18
    .set CR4_SMEP, 1 << 20
    .set CR4_SMAP, 1 << 21

    .set FLAG_CF, 1 << 0
    .set FLAG_ZF, 1 << 6
    .set FLAG_TF, 1 << 8
    .set FLAG_IF, 1 << 9
    .set FLAG_DF, 1 << 10
    .set FLAG_OF, 1 << 11
    .set FLAG_IOPL3, 3 << 12
    .set FLAG_NT, 1 << 14
    .set FLAG_RF, 1 << 16
    .set FLAG_AC, 1 << 18

    # Vectors.
    .set DE, 0
    .set DB, 1
    .set NMI, 2
    .set BP, 3
    .set OF, 4
    .set BR, 5
    .set UD, 6
    .set NM, 7
    .set DF, 8
    .set TS, 10
    .set NP, 11
    .set SS, 12
    .set GP, 13
    .set PF, 14
    .set MF, 16
    .set AC, 17
    .set XM, 19
    .set BACK, 0x80                 # how code at CPL 3 says that nothing has happened
    .set NONE, 0xffff

    # Kinds of results.
    .set NUMBER, 0
    .set EXCEPTION, 1               # vector << 48 | (RIP - expected RIP) << 32 | error code
    .set NOT_OFFERED, 2             # the CPU lacks what the case needs

    # Modes in which a case begins.
    .set LONG, 0
    .set PROTECTED, 1
    .set REAL, 2
    # How a case ends.
    .set BY_PORT, 0
    .set BY_TRIPLE_FAULT, 1
    # Where a case runs.
    .set ANYWHERE, 0
    .set NOT_KVM, 1                 # nested KVM or the processor emulated below it is wrong

    .set END_PORT, 0xf4

    .pushsection .rodata.bare_guest, "a", @progbits
    # Within it, code and data are subsection 0, texts 1, and the table of cases 2.
    .globl bare_image, bare_cases, bare_cases_end
    .subsection 2
    .balign 16
bare_cases:
    .subsection 0
bare_image:
image:
    .set org, image - IMAGE

# Begins a case. It is entered with interrupts off and, in long mode, with the tables below.
.macro case name, mode=LONG, cpus=1, end=BY_PORT, where=ANYWHERE
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 2
    .long .Lname\@ - org, .Lentry\@ - org
    .byte \mode, \cpus, \end, \where
    .subsection 0
    .balign 16
.Lentry\@:
.endm

# Ends a case.
.macro finish
    outb %al, $END_PORT
.Lstop\@:
    jmp .Lstop\@
.endm

# Compares a 64-bit register or memory operand with a constant. Changes nothing, not even flags.
.macro check name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushq \got
    pushq $(\want) & 0x7fffffff
    movl $(\want) & 0xffffffff, (%rsp)
    movl $(\want) >> 32, 4(%rsp)
    pushq $.Lname\@ - org
    call record64
.endm

# The same with two operands.
.macro check_same name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushq \got
    pushq \want
    pushq $.Lname\@ - org
    call record64
.endm

# The same in 32-bit code.
.macro check32 name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushl \got
    pushl $\want
    pushl $.Lname\@ - org
    call record32
.endm

# The same in 16-bit code, with a 32-bit operand. The stack segment is 0.
.macro check16 name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushl \got
    pushl $\want
    pushl $.Lname\@ - org
    callw record16
.endm

# Compares with an address in the image. The result is the difference, which does not change when
# code elsewhere does.
.macro check_address name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushq %rax
    movq \got, %rax
    leaq -(\want)(%rax), %rax
    xchgq %rax, (%rsp)
    pushq $0
    pushq $.Lname\@ - org
    call record64
.endm

.macro check_address32 name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushl %eax
    movl \got, %eax
    leal -(\want)(%eax), %eax
    xchgl %eax, (%esp)
    pushl $0
    pushl $.Lname\@ - org
    call record32
.endm

.macro check_address16 name, got, want
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushl \got
    pushw %bp
    movw %sp, %bp
    subl $\want, 2(%bp)
    popw %bp
    pushl $0
    pushl $.Lname\@ - org
    callw record16
.endm

# Ends the case, leaving out what it would have shown, unless a bit of CPUID's answer is set.
.macro need leaf, subleaf, reg, bit
    movl $\leaf, %eax
    movl $\subleaf, %ecx
    cpuid
    btl $\bit, \reg
    jc .Lhas\@
    call not_offered
.Lhas\@:
.endm

# Where the next exception goes on, with the stack of here.
.macro recover_at label
    movq $\label - org, recover_rip - org
    movq %rsp, recover_rsp - org
.endm

.macro check_exception name, vector, error, rip
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushq $0
    movl $\rip, (%rsp)
    pushq $\error
    movw $\vector, 6(%rsp)
    pushq $.Lname\@ - org
    call record_exception
.endm

# Carries out one instruction in 64-bit code at CPL 0, which must cause an exception, or NONE.
.macro fault name, vector, error, insn:vararg
    recover_at .Lafter\@
.Lat\@:
    \insn
    call no_exception
.Lafter\@:
    check_exception "\name", \vector, \error, .Lat\@ - org
.endm

# The same, where the exception's return address is not the instruction's own.
.macro fault_to name, vector, error, rip, insn:vararg
    recover_at .Lafter\@
    \insn
    call no_exception
.Lafter\@:
    check_exception "\name", \vector, \error, \rip
.endm

# The same for a trap, which returns behind the instruction.
.macro trap name, vector, error, insn:vararg
    recover_at .Lafter\@
    \insn
.Lat\@:
    call no_exception
.Lafter\@:
    check_exception "\name", \vector, \error, .Lat\@ - org
.endm

# The same at CPL 3. Registers keep their values; `user_flags` are the flags.
.macro user name, vector, error, insn:vararg
    jmp .Lenter\@
.Lat\@:
    \insn
    int $BACK
.Lenter\@:
    recover_at .Lafter\@
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq user_flags - org
    pushq $USER64
    pushq $.Lat\@ - org + USER
    iretq
.Lafter\@:
    check_exception "\name", \vector, \error, .Lat\@ - org + USER
.endm

# The same in 32-bit code at CPL 3.
.macro user32 name, vector, error, insn:vararg
    jmp .Lenter\@
    .code32
.Lat\@:
    \insn
    int $BACK
    .code64
.Lenter\@:
    user_segments
    recover_at .Lafter\@
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq user_flags - org
    pushq $USER32
    pushq $.Lat\@ - org + USER
    iretq
.Lafter\@:
    check_exception "\name", \vector, \error, .Lat\@ - org + USER
.endm

# Carries out one instruction in 32-bit code without long mode.
.macro fault32 name, vector, error, insn:vararg
    movl $.Lafter\@ - org, recover_rip - org
    movl %esp, recover_rsp - org
.Lat\@:
    \insn
    call no_exception32
.Lafter\@:
    check_exception32 "\name", \vector, \error, .Lat\@ - org
.endm

# The same for a trap, which returns behind the instruction.
.macro trap32 name, vector, error, insn:vararg
    movl $.Lafter\@ - org, recover_rip - org
    movl %esp, recover_rsp - org
    \insn
.Lat\@:
    call no_exception32
.Lafter\@:
    check_exception32 "\name", \vector, \error, .Lat\@ - org
.endm

# The same at CPL 3.
.macro outer32 name, vector, error, insn:vararg
    jmp .Lenter\@
.Lat\@:
    \insn
    int $BACK
.Lenter\@:
    enter_outer32 .Lat\@
    check_exception32 "\name", \vector, \error, .Lat\@ - org
.endm

# Runs the code at a label at CPL 3 until it causes an exception, or BACK.
.macro enter_outer32 label
    movl $.Lafter\@ - org, recover_rip - org
    movl %esp, recover_rsp - org
    pushl $USERDATA
    pushl $STACK_USER
    pushl user_flags - org
    pushl $USER32
    pushl $\label - org
    pushl $USERDATA
    popl %ds
    pushl $USERDATA
    popl %es
    iretl
.Lafter\@:
.endm

.macro check_exception32 name, vector, error, rip
    .subsection 1
.Lname\@: .asciz "\name"
    .subsection 0
    pushl $\rip
    pushl $\vector
    pushl $\error
    pushl $.Lname\@ - org
    call record_exception32
.endm

# 32-bit code needs segments that may be used at CPL 3.
.macro user_segments
    pushq %rax
    movl $USERDATA, %eax
    movl %eax, %ds
    movl %eax, %es
    popq %rax
.endm

# Runs the code at a label at CPL 3 until it causes an exception, or BACK.
.macro enter_user label, selector=USER64
    user_segments
    recover_at .Lafter\@
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq user_flags - org
    pushq $\selector
    pushq $\label - org + USER
    iretq
.Lafter\@:
.endm

# Writes a page-table entry; does not invalidate.
.macro set_entry at, value
    movl $(\value) & 0xffffffff, \at
    movl $(\value) >> 32, \at + 4
.endm

# Maps page `index` of TEST and invalidates it.
.macro map_test index, value
    set_entry PT_TEST + 8 * (\index), \value
    invlpg TEST + 4096 * (\index)
.endm

# Changes control registers. Uses RAX.
.macro set_bits register, bits
    movq \register, %rax
    orq $\bits, %rax
    movq %rax, \register
.endm

.macro clear_bits register, bits
    movq \register, %rax
    andq $~(\bits), %rax
    movq %rax, \register
.endm

# Starts all other CPUs.
.macro start_processors count
    apic_write APIC_SVR, $0x1ff
    apic_write APIC_ICR, $0xc4500   # INIT to all but this one
    wait_cycles 100000
    apic_write APIC_ICR, $0xc4600 | START_VECTOR
    wait_cycles 100000
    apic_write APIC_ICR, $0xc4600 | START_VECTOR
    wait_for processors_started, \count
.endm

# Gives work to CPUs 1 to `count`.
.macro give_work count, label
    movl $0, processors_done - org
    .set id, 1
    .rept \count
    movq $\label - org, processor_work - org + 8 * id
    .set id, id + 1
    .endr
.endm

# Waits until a 32-bit variable is at least so large.
.macro wait_for variable, value
.Lwait\@:
    pause
    cmpl $\value, \variable - org
    jb .Lwait\@
.endm

# Waits for some cycles of the time-stamp counter. Changes nothing.
.macro wait_cycles cycles
    pushq $\cycles
    call wait_cycles
.endm

# Points a gate of the long-mode IDT at a label.
.macro gate vector, label, kind=0x8e, ist=0
    movw $(\label - org) & 0xffff, idt64 - org + 16 * (\vector)
    movw $(\ist) | (\kind) << 8, idt64 - org + 16 * (\vector) + 4
    movw $(\label - org) >> 16, idt64 - org + 16 * (\vector) + 6
.endm

.macro write_msr msr, value
    movl $\msr, %ecx
    movl $(\value) & 0xffffffff, %eax
    movl $(\value) >> 32, %edx
    wrmsr
.endm

.macro apic_write register, value
    pushq %rdi
    movl $APIC, %edi
    movl \value, \register(%rdi)
    popq %rdi
.endm

.macro apic_read register, into
    movl $APIC, \into
    movl \register(%r\into), \into
.endm

# Where other CPUs begin, in real mode: a page of its own, whose number is the start-up vector. They
# enter long mode and then do the work that `processor_work` gives them.
    .set START_VECTOR, IMAGE >> 12
    .code16
    movl %eax, start_registers - org
    movl %ebx, start_registers - org + 4
    movl %ecx, start_registers - org + 8
    movl %esp, start_registers - org + 12
    movl %ebp, start_registers - org + 16
    movl %esi, start_registers - org + 20
    movl %edi, start_registers - org + 24
    movl %cs, %eax
    movw %ax, start_registers - org + 28
    movl %ds, %eax
    movw %ax, start_registers - org + 30
    movl %ss, %eax
    movw %ax, start_registers - org + 32
    movl %cr0, %eax
    movl %eax, start_registers - org + 36
    movl %cr4, %eax
    movl %eax, start_registers - org + 40
    movl %dr6, %eax
    movl %eax, start_registers - org + 44
    movl %dr7, %eax
    movl %eax, start_registers - org + 48
    sidtl start_registers - org + 52
    movw $STACK_REAL, %sp
    pushfl
    popl start_registers - org + 60
    movl $MSR_EFER, %ecx
    rdmsr
    movl %eax, start_registers - org + 64
    lgdtl gdt_pointer - org
    lidtl idt64_pointer - org
    movl $PML4, %eax
    movl %eax, %cr3
    movl $CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, %eax
    movl %eax, %cr4
    movl $0xd01, %eax
    xorl %edx, %edx
    wrmsr
    movl $CR0_PG | CR0_WP | CR0_NE | CR0_MP | CR0_PE | 0x10, %eax
    movl %eax, %cr0
    ljmpl $CODE64, $start_long - org
    .code64
start_long:
    movl $DATA, %eax
    movl %eax, %ss
    movl %eax, %ds
    movl %eax, %es
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %r15d                # APIC id
    movl %ebx, %esp
    shll $13, %esp
    addl $STACK, %esp
    apic_write APIC_SVR, $0x1ff
    lock incl processors_started - org
1:  movq processor_work - org(, %r15, 8), %rax
    testq %rax, %rax
    jz 2f
    movq $0, processor_work - org(, %r15, 8)
    call *%rax
    lock incl processors_done - org
2:  pause
    jmp 1b

    .balign 8
start_registers: .fill 9, 8, 0
processor_work: .fill 8, 8, 0       # address of what each CPU shall do
processors_started: .quad 0
processors_done: .quad 0

    .code64

# Stack: name, expected value, value. Removes them and changes nothing else.
record64:
    pushfq
    pushq %rax
    pushq %rdi
    movl RESULTS, %edi
    imull $RECORD, %edi
    addl $RESULTS + 32, %edi
    movl 32(%rsp), %eax
    movl %eax, (%rdi)
    movl $NUMBER, 4(%rdi)
    movq 48(%rsp), %rax
    movq %rax, 8(%rdi)
    movq 40(%rsp), %rax
    movq %rax, 16(%rdi)
    incl RESULTS
    popq %rdi
    popq %rax
    popfq
    ret $24

# Stack: name, expected vector and error code, expected RIP.
record_exception:
    pushfq
    pushq %rax
    pushq %rdi
    movl RESULTS, %edi
    imull $RECORD, %edi
    addl $RESULTS + 32, %edi
    movl 32(%rsp), %eax
    movl %eax, (%rdi)
    movl $EXCEPTION, 4(%rdi)
    movl last_error - org, %eax
    movl %eax, 8(%rdi)
    movw last_vector - org, %ax
    movw %ax, 14(%rdi)
    movw $0, 12(%rdi)
    cmpw $32, %ax
    jae 1f
    movq last_rip - org, %rax
    subq 48(%rsp), %rax
    movw %ax, 12(%rdi)
1:
    movq 40(%rsp), %rax
    movq %rax, 16(%rdi)
    cmpb $BACK, 14(%rdi)            # code at CPL 3 has come to its end
    jne 1f
    cmpw $NONE, 22(%rdi)
    jne 1f
    movq %rax, 8(%rdi)
1:
    incl RESULTS
    popq %rdi
    popq %rax
    popfq
    ret $24

wait_cycles:
    pushq %rax
    pushq %rdx
    pushq %rbx
    rdtsc
    movl %eax, %ebx
1:  pause
    rdtsc
    subl %ebx, %eax
    cmpl 32(%rsp), %eax
    jb 1b
    popq %rbx
    popq %rdx
    popq %rax
    ret $8

no_exception:
    movq $NONE, last_vector - org
    movq $0, last_error - org
    movq $0, recover_rip - org
    ret

not_offered:
    movl $1, RESULTS
    movl $NOT_OFFERED, RESULTS + 32 + 4
    finish

common64:
    pushfq
    popq handler_flags - org
    movq %rax, last_registers - org
    movq %rcx, last_registers - org + 8
    movq %rdx, last_registers - org + 16
    movq %rbx, last_registers - org + 24
    movq %rbp, last_registers - org + 40
    movq %rsi, last_registers - org + 48
    movq %rdi, last_registers - org + 56
    popq last_vector - org
    popq last_error - org
    popq last_rip - org
    popq last_cs - org
    popq last_flags - org
    popq last_rsp - org
    popq last_ss - org
    movq %rsp, handler_rsp - org
    movq %cr2, %rax
    movq %rax, last_cr2 - org
    incq exceptions - org
    cmpq $0, recover_rip - org
    je 1f
    movl $DATA, %eax
    movl %eax, %ss
    movq recover_rsp - org, %rsp
    movq last_registers - org, %rax
    pushq recover_rip - org
    movq $0, recover_rip - org
    pushq $2
    popfq
    ret
1:
    # Nobody expected it: the case fails here.
    movl $STACK, %esp
    check_exception "unexpected", NONE, 0, 0
    movq last_rip - org, %rax
    check "unexpected-rip", %rax, 0
    finish

    .code32

record32:
    pushfl
    pushl %eax
    pushl %edi
    movl RESULTS, %edi
    imull $RECORD, %edi
    addl $RESULTS + 32, %edi
    movl 16(%esp), %eax
    movl %eax, (%edi)
    movl $NUMBER, 4(%edi)
    movl 24(%esp), %eax
    movl %eax, 8(%edi)
    movl $0, 12(%edi)
    movl 20(%esp), %eax
    movl %eax, 16(%edi)
    movl $0, 20(%edi)
    incl RESULTS
    popl %edi
    popl %eax
    popfl
    ret $12

# Stack: name, error code, vector, EIP.
record_exception32:
    pushfl
    pushl %eax
    pushl %edi
    movl RESULTS, %edi
    imull $RECORD, %edi
    addl $RESULTS + 32, %edi
    movl 16(%esp), %eax
    movl %eax, (%edi)
    movl $EXCEPTION, 4(%edi)
    movl last_error - org, %eax
    movl %eax, 8(%edi)
    movw last_vector - org, %ax
    movw %ax, 14(%edi)
    movw $0, 12(%edi)
    cmpw $32, %ax
    jae 1f
    movl last_rip - org, %eax
    subl 28(%esp), %eax
    movw %ax, 12(%edi)
1:
    movl 20(%esp), %eax
    movl %eax, 16(%edi)
    movw $0, 20(%edi)
    movw 24(%esp), %ax
    movw %ax, 22(%edi)
    cmpb $BACK, 14(%edi)
    jne 1f
    cmpw $NONE, %ax
    jne 1f
    movw %ax, 14(%edi)
1:
    incl RESULTS
    popl %edi
    popl %eax
    popfl
    ret $16

no_exception32:
    movl $NONE, last_vector - org
    movl $0, last_error - org
    movl $0, recover_rip - org
    ret

common32:
    pushl %eax
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    popl %eax
    pushfl
    popl handler_flags - org
    movl %eax, last_registers - org
    movl %ebx, last_registers - org + 24
    movl %ecx, last_registers - org + 8
    movl %esi, last_registers - org + 48
    movl %edx, last_registers - org + 16
    movl %edi, last_registers - org + 56
    popl last_vector - org
    popl last_error - org
    popl last_rip - org
    popl last_cs - org
    popl last_flags - org
    movl %esp, handler_rsp - org
    movl (%esp), %eax               # there if the exception was at CPL 3
    movl %eax, last_rsp - org
    movl 4(%esp), %eax
    movl %eax, last_ss - org
    movl %cr2, %eax
    movl %eax, last_cr2 - org
    incl exceptions - org
    cmpl $0, recover_rip - org
    je 1f
    movl $DATA, %eax
    movl %eax, %ss
    movl recover_rsp - org, %esp
    movl last_registers - org, %eax
    pushl recover_rip - org
    movl $0, recover_rip - org
    pushl $2
    popfl
    ret
1:
    movl $STACK, %esp
    check_exception32 "unexpected", NONE, 0, 0
    movl last_rip - org, %eax
    check32 "unexpected-rip", %eax, 0
    finish

    .code16

record16:
    pushfl
    pushw %ds
    pushl %eax
    pushl %edi
    pushl %ebp
    xorl %ebp, %ebp
    movw %sp, %bp
    movw $RESULTS >> 4, %ax
    movw %ax, %ds
    movl 0, %edi
    imull $RECORD, %edi
    addl $32, %edi
    movl 20(%bp), %eax
    movl %eax, (%di)
    movl $NUMBER, 4(%di)
    movl 28(%bp), %eax
    movl %eax, 8(%di)
    movl $0, 12(%di)
    movl 24(%bp), %eax
    movl %eax, 16(%di)
    movl $0, 20(%di)
    incl 0
    popl %ebp
    popl %edi
    popl %eax
    popw %ds
    popfl
    retw $12

# One stub of 16 bytes for each vector. The CPU pushes an error code for some.
    .code64
    .balign 16
stubs64:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    pushq $0
    .endif
    pushq $vector
    jmp common64
    .set vector, vector + 1
    .endr

    .code32
    .balign 16
stubs32:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    pushl $0
    .endif
    pushl $vector
    jmp common32
    .set vector, vector + 1
    .endr

# Interrupt gates for all vectors; CPL 3 may use BP, OF and BACK.
    .balign 16
    .globl bare_idt64
bare_idt64:
idt64:
    .set vector, 0
    .rept 256
    .short stubs64 - org + 16 * vector
    .short CODE64
    .if vector == BP || vector == OF || vector == BACK
    .short 0xee00
    .else
    .short 0x8e00
    .endif
    .short 0
    .quad 0
    .set vector, vector + 1
    .endr

    .globl bare_idt32
bare_idt32:
idt32:
    .set vector, 0
    .rept 256
    .short stubs32 - org + 16 * vector
    .short CODE32
    .if vector == BP || vector == OF || vector == BACK
    .short 0xee00
    .else
    .short 0x8e00
    .endif
    .short 0
    .set vector, vector + 1
    .endr

    .globl bare_gdt, bare_gdt_end, bare_tss
bare_gdt:
gdt:
    .quad 0
    .quad 0x00209b0000000000        # CODE64
    .quad 0x00cf93000000ffff        # DATA: flat
    .quad 0x00cf9b000000ffff        # CODE32: flat
    .quad 0x00009b000000ffff        # CODE16: 64 KiB
    .quad 0x000093000000ffff        # DATA16
    .quad 0x00cffb000000ffff        # USER32
    .quad 0x00cff3000000ffff        # USERDATA
    .quad 0x0020fb0000000000        # USER64
tss_descriptor:                     # 64-bit, busy; the first half is a 32-bit one
    .short TSS_LIMIT, tss - org
    .byte 0, 0x8b, 0, 0
    .quad 0
    # LDT, 16 bytes in long mode.
ldt_descriptor:
    .short ldt_end - ldt - 1, ldt - org
    .byte 0, 0x82, 0, 0
    .quad 0
spare:
    .fill 16, 8, 0
bare_gdt_end:
gdt_end:

ldt:
    .quad 0
    .quad 0x00cf93000000ffff        # 0xc: data
    .quad 0x00209b0000000000        # 0x14: code
ldt_end:

    .balign 16
bare_tss:
tss:
    .long 0
    .quad STACK_RSP0                # RSP0
    .quad 0, 0, 0                   # RSP1, RSP2, reserved
    .quad STACK_IST1, STACK_IST2
    .quad 0, 0, 0, 0, 0, 0
    .short 0
    .short tss_io - tss
tss_io:
    .fill 128, 1, 0xff              # ports 0 to 0x3ff
    .byte 0xff
tss_end:
    .set TSS_LIMIT, tss_end - tss - 1

    .balign 8
last_registers: .fill 16, 8, 0      # rax, rcx, rdx, rbx, -, rbp, rsi, rdi
last_vector: .quad 0
last_error: .quad 0
last_rip: .quad 0
last_cs: .quad 0
last_flags: .quad 0
last_rsp: .quad 0
last_ss: .quad 0
last_cr2: .quad 0
handler_flags: .quad 0               # flags in the handler
handler_rsp: .quad 0                # stack pointer of the handler with the frame removed
exceptions: .quad 0                 # how many there have been
recover_rip: .quad 0
recover_rsp: .quad 0
user_flags: .quad 2

gdt_pointer:
    .short gdt_end - gdt - 1
    .quad gdt - org
idt64_pointer:
    .short 0xfff
    .quad idt64 - org
idt32_pointer:
    .short 0x7ff
    .quad idt32 - org
ivt_pointer:
    .short 0x3ff
    .quad 0
    .code64
