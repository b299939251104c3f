# 32-bit protected mode: segments, privilege levels, and the three ways of paging it has.

    .code32

    case "protected", mode=PROTECTED
    movl $1, %eax
    pushl %eax
    movl $STACK, %ebx
    subl %esp, %ebx
    popl %ecx
    check32 "push", %ebx, 4
    pushal
    movl %esp, FRAMES
    popal
    check32 "pusha", FRAMES, STACK - 32
    pushw $0x1234
    movl $STACK, %ebx
    subl %esp, %ebx
    popw %ax
    check32 "push-word", %ebx, 2
    fault32 "ud2", UD, 0, ud2
    check32 "frame-cs", last_cs-org, CODE32
    check32 "frame", handler_rsp-org, STACK
    xorl %ecx, %ecx
    fault32 "div", DE, 0, divl %ecx
    trap32 "int3", BP, 0, int3
    trap32 "int-0x80", BACK, 0, int $BACK
    movb $0x7f, %al
    addb $1, %al
    trap32 "into", OF, 0, into
    xorl %eax, %eax
    fault32 "into-clear", NONE, 0, into
    movl $1, FRAMES
    movl $5, FRAMES + 4
    movl $FRAMES, %ebx
    fault32 "bound", BR, 0, .byte 0x62, 0x03
    movl $0x1238, %eax
    fault32 "load-beyond", GP, 0x1238, movl %eax, %ds
    movl $TSS, %eax
    fault32 "load-system", GP, TSS, movl %eax, %ds
    xorl %eax, %eax
    fault32 "load-ss-null", GP, 0, movl %eax, %ss
    fault32 "load-null", NONE, 0, movl %eax, %fs
    movl $0x0000ffff, spare-org
    movl $0x00cf1300, spare-org + 4
    movl $SPARE, %eax
    fault32 "load-not-present", NP, SPARE, movl %eax, %gs
    fault32 "load-ss-not-present", SS, SPARE, movl %eax, %ss
    # A segment with a base; accesses wrap around at 4 GiB.
    movl $0x00cf9310, spare-org + 4
    movl %eax, %fs
    movl $0x44332211, FRAMES + 0x20
    movl %fs:0x20, %ecx
    check32 "base", %ecx, 0x44332211
    movl $-FRAMES + 0x7000, %ecx
    movl $0x99, 0x7000
    movl %fs:(%ecx), %ecx
    check32 "base-wrapped", %ecx, 0x99
    # 16-bit addresses.
    movl $0x10020, %ebx
    movl $0x600, %esi
    movl $0x87654321, 0x620
    movl (%bx, %si), %ecx
    check32 "address-16", %ecx, 0x87654321
    # Far calls.
    lcall $CODE32, $1f-org
.Lbehind_call32:
    jmp 2f
1:  movl (%esp), %eax
    movl 4(%esp), %ebx
    check_address32 "call-return", %eax, .Lbehind_call32-org
    check32 "call-cs", %ebx, CODE32
    lretl
2:  check32 "call-esp", %esp, STACK
    # 16-bit code on this stack: IP and SP have their sizes from different segments.
    ljmp $CODE16, $1f-org
    .code16
1:  movw $0x55, %ax
    pushw %ax
    movl %esp, %ecx
    popw %bx
    call 2f
2:  popw %dx
    ljmpl $CODE32, $1f-org
    .code32
1:  check32 "code-16-esp", %ecx, STACK - 2
    movzwl %dx, %edx
    check_address32 "code-16-call", %edx, 2b-org
    # A 16-bit stack: the upper half of ESP neither counts nor changes.
    movl $DATA16, %eax
    movl %eax, %ss
    movl $0x12340f00, %esp
    pushl $0x77777777
    movl %esp, %ebx
    movl $DATA, %eax
    movl %eax, %ss
    movl $STACK, %esp
    check32 "stack-16-esp", %ebx, 0x12340efc
    movl 0xefc, %eax
    check32 "stack-16-memory", %eax, 0x77777777
    finish

# The rig's processor checks neither limits nor null selectors.
    case "protected-limits", mode=PROTECTED, where=NOT_KVM
    xorl %eax, %eax
    movl %eax, %fs
    fault32 "null-read", GP, 0, movl %fs:0x1000, %ecx
    fault32 "null-write", GP, 0, movl %ecx, %fs:0x1000
    movl $0x00000fff, spare-org
    movl $0x00409300, spare-org + 4
    movl $SPARE, %eax
    movl %eax, %fs
    fault32 "inside", NONE, 0, movl %fs:0xffc, %ecx
    fault32 "beyond", GP, 0, movl %fs:0xffd, %ecx
    fault32 "beyond-byte", GP, 0, movb %fs:0x1000, %cl
    # Expands down: valid above the limit.
    movl $0x00409700, spare-org + 4
    movl %eax, %fs
    fault32 "down-inside", NONE, 0, movl %fs:0x1000, %ecx
    fault32 "down-below", GP, 0, movl %fs:0xffc, %ecx
    # Read only, and execute only.
    movl $0x00409100, spare-org + 4
    movl %eax, %fs
    fault32 "read-only-read", NONE, 0, movl %fs:0, %ecx
    fault32 "read-only-write", GP, 0, movl %ecx, %fs:0
    fault32 "code-write", GP, 0, movl %ecx, %cs:0x2000
    finish

# CPL 0 has a stack here. LTR is for the rig's processor, which otherwise dies of a busy TSS.
    .macro outer_stack
    movl $DATA, tss-org + 8
    movb $0x89, tss_descriptor-org + 5
    movl $TSS, %eax
    ltr %ax
    .endm

    case "protected-cpl-3", mode=PROTECTED
    outer_stack
    outer32 "nop", NONE, 0, nop
    check32 "cs", last_cs-org, USER32
    check32 "ss", last_ss-org, USERDATA
    check32 "esp", last_rsp-org, STACK_USER
    check32 "handler-esp", handler_rsp-org, STACK_RSP0 - 8
    outer32 "hlt", GP, 0, hlt
    outer32 "cli", GP, 0, cli
    outer32 "mov-cr0", GP, 0, movl %cr0, %eax
    outer32 "in", GP, 0, inb $0x60, %al
    outer32 "lgdt", GP, 0, lgdt gdt_pointer-org
    movl $DATA, %ecx
    outer32 "load-dpl-0", GP, DATA, movl %ecx, %fs
    outer32 "jump-dpl-0", GP, CODE32, ljmp $CODE32, $0
    # IRET has cleared segment registers that CPL 3 may not keep.
    movl $DATA, %eax
    movl %eax, %fs
    outer32 "cleared", NONE, 0, nop
    movl %fs, %eax
    check32 "cleared-fs", %eax, 0
    # A call gate that copies two words of the stack.
    movl $1f-org, %eax
    movw %ax, spare-org
    movw $CODE32, spare-org + 2
    movw $0xec02, spare-org + 4
    shrl $16, %eax
    movw %ax, spare-org + 6
    enter_outer32 2f
    jmp 3f
2:  pushl $0x1111
    pushl $0x2222
    lcall $SPARE + 3, $0
.Lbehind_gate32:
    ud2
1:  pushl $DATA
    popl %ds
    movl %esp, %ebx
    movl $STACK - 0x100, %esp
    check32 "gate-esp", %ebx, STACK_RSP0 - 24
    movl (%ebx), %eax
    check_address32 "gate-eip", %eax, .Lbehind_gate32-org
    movl 4(%ebx), %eax
    check32 "gate-cs", %eax, USER32
    movl 8(%ebx), %eax
    check32 "gate-parameter-1", %eax, 0x2222
    movl 12(%ebx), %eax
    check32 "gate-parameter-2", %eax, 0x1111
    movl 16(%ebx), %eax
    check32 "gate-old-esp", %eax, STACK_USER - 8
    movl 20(%ebx), %eax
    check32 "gate-old-ss", %eax, USERDATA
    movl %ebx, %esp
    lretl $8
3:  check_exception32 "gate-lret", UD, 0, .Lbehind_gate32-org
    check32 "gate-lret-esp", last_rsp-org, STACK_USER
    finish

    case "protected-sysenter", mode=PROTECTED
    outer_stack
    movl $MSR_SYSENTER_CS, %ecx
    movl $CODE32, %eax
    xorl %edx, %edx
    wrmsr
    movl $MSR_SYSENTER_ESP, %ecx
    movl $STACK - 0x100, %eax
    wrmsr
    movl $MSR_SYSENTER_EIP, %ecx
    movl $2f-org, %eax
    wrmsr
    movl $FLAG_IF | FLAG_CF | 2, user_flags-org
    enter_outer32 1f
    jmp 3f
1:  sysenter
2:  pushfl
    popl %eax
    movl %esp, %esi
    movl %cs, %ebx
    movl %ss, %edi
    pushl $DATA
    popl %ds
    check32 "flags", %eax, FLAG_CF | 2
    check32 "esp", %esi, STACK - 0x100
    check32 "cs", %ebx, CODE32
    check32 "ss", %edi, CODE32 + 8
    movl $4f-org, %edx
    movl $STACK_USER, %ecx
    sysexitl
4:  ud2
3:  check_exception32 "sysexit", UD, 0, 4b-org
    check32 "sysexit-esp", last_rsp-org, STACK_USER
    check32 "sysexit-cs", last_cs-org, CODE32 + 16 + 3
    check32 "sysexit-ss", last_ss-org, CODE32 + 24 + 3
    movl $2, user_flags-org
    outer32 "sysexit-cpl-3", GP, 0, sysexitl
    movl $MSR_SYSENTER_CS, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    fault32 "no-cs", GP, 0, sysenter
    finish

# Without a stack for CPL 0 no exception of CPL 3 can be delivered.
    case "protected-bad-stack", mode=PROTECTED, end=BY_TRIPLE_FAULT
    outer_stack
    movl $0, tss-org + 8
    movl $1, %eax
    check32 "before", %eax, 1
    outer32 "never", NONE, 0, ud2
    finish

# Page directory at SPARE_TABLES, page table behind it.
    .macro identity_32
    movl $SPARE_TABLES, %edi
    movl $0x87, %eax                # 4 MiB pages: all memory, for everybody
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $4, %edi
    addl $0x400000, %eax
    loop 1b
    movl $SPARE_TABLES, %eax
    movl %eax, %cr3
    movl $CR4_PSE, %eax
    movl %eax, %cr4
    movl %cr0, %eax
    orl $CR0_PG | CR0_WP, %eax
    movl %eax, %cr0
    jmp 1f
1:
    .endm
    .set PDE_32, SPARE_TABLES + (TEST >> 22) * 4
    .set PT_32, SPARE_TABLES + 0x1000

    case "paging-32-bit", mode=PROTECTED
    outer_stack
    identity_32
    movl $TEST + 0x234, %ebx
    fault32 "absent-read", PF, 0, movl (%ebx), %eax
    check32 "absent-cr2", last_cr2-org, TEST + 0x234
    fault32 "absent-write", PF, 2, movl %eax, (%ebx)
    outer32 "absent-user", PF, 4, movl (%ebx), %eax
    movl $PT_32 + URW, PDE_32
    fault32 "absent-page", PF, 0, movl (%ebx), %eax
    movl $FRAMES + URW, PT_32
    movl $0x1234, FRAMES + 0x234
    movl (%ebx), %ecx
    check32 "read", %ecx, 0x1234
    movl PT_32, %eax
    check32 "accessed", %eax, FRAMES + URW + ACCESSED
    movl %ecx, (%ebx)
    movl PT_32, %eax
    check32 "dirty", %eax, FRAMES + URW + ACCESSED + DIRTY
    movl PDE_32, %eax
    andl $~DIRTY, %eax              # ignored there
    check32 "directory-accessed", %eax, PT_32 + URW + ACCESSED
    outer32 "user-write", NONE, 0, movl %ecx, (%ebx)
    movl $FRAMES + PRESENT + FOR_USER, PT_32
    invlpg (%ebx)
    fault32 "read-only", PF, 3, movl %ecx, (%ebx)
    outer32 "user-read-only", PF, 7, movl %ecx, (%ebx)
    movl $FRAMES + RW, PT_32
    invlpg (%ebx)
    outer32 "supervisor", PF, 5, movl (%ebx), %ecx
    # A large page.
    movl SPARE_TABLES, %eax
    andl $ACCESSED | DIRTY | LARGE, %eax
    check32 "large-dirty", %eax, ACCESSED | DIRTY | LARGE
    movl $LARGE + PRESENT, PDE_32
    invlpg (%ebx)
    movl $0x5678, 0x1f0000
    movl TEST + 0x1f0000, %ecx
    check32 "large-read", %ecx, 0x5678
    fault32 "large-read-only", PF, 3, movl %ecx, (%ebx)
    outer32 "large-supervisor", PF, 5, movl (%ebx), %ecx
    # Without PSE the bit means nothing: the entry points to a table.
    movl $FRAMES + 0x6000 + RW, PT_32
    movl $0x9abc, FRAMES + 0x6234
    movl $PT_32 + URW + LARGE, PDE_32
    # Everything else is in large pages too: leave paging meanwhile.
    movl %cr0, %eax
    andl $~CR0_PG, %eax
    movl %eax, %cr0
    jmp 1f
1:  movl $SPARE_TABLES + 0x2000 + URW, SPARE_TABLES
    movl $SPARE_TABLES + 0x2000, %edi
    movl $URW, %eax
    movl $1024, %ecx
1:  movl %eax, (%edi)
    addl $4, %edi
    addl $0x1000, %eax
    loop 1b
    xorl %eax, %eax
    movl %eax, %cr4
    movl $SPARE_TABLES, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $CR0_PG, %eax
    movl %eax, %cr0
    jmp 1f
1:  movl (%ebx), %ecx
    check32 "no-pse", %ecx, 0x9abc
    # Without paging again.
    movl %cr0, %eax
    andl $~CR0_PG, %eax
    movl %eax, %cr0
    jmp 1f
1:  movl $0x77, FRAMES
    movl FRAMES, %ecx
    check32 "paging-off", %ecx, 0x77
    finish

    .set PDPT_PAE, SPARE_TABLES
    .set PD_PAE, SPARE_TABLES + 0x1000
    .set PD_PAE_TEST, SPARE_TABLES + 0x2000
    .set PT_PAE, SPARE_TABLES + 0x3000

    case "paging-pae", mode=PROTECTED
    outer_stack
    movl $PD_PAE + PRESENT, PDPT_PAE
    movl $PD_PAE_TEST + PRESENT, PDPT_PAE + 8
    movl $PD_PAE, %edi
    movl $LARGE + URW, %eax
    movl $8, %ecx
1:  movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    loop 1b
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $PDPT_PAE, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    rdmsr
    orl $0x800, %eax
    wrmsr
    movl %cr0, %eax
    orl $CR0_PG | CR0_WP, %eax
    movl %eax, %cr0
    jmp 1f
1:  movl $TEST + 0x234, %ebx
    fault32 "absent", PF, 0, movl (%ebx), %eax
    movl $PT_PAE + URW, PD_PAE_TEST + 256 * 8
    movl $FRAMES + URW, PT_PAE
    movl $0x1234, FRAMES + 0x234
    movl (%ebx), %ecx
    check32 "read", %ecx, 0x1234
    movl %ecx, (%ebx)
    movl PT_PAE, %eax
    check32 "entry", %eax, FRAMES + URW + ACCESSED + DIRTY
    outer32 "user-write", NONE, 0, movl %ecx, (%ebx)
    # NX: the exception's address is the target.
    movl $1 << 31, PT_PAE + 4
    invlpg (%ebx)
    movl $1f-org, recover_rip-org
    movl %esp, recover_rsp-org
    jmp *%ebx
1:  check_exception32 "nx", PF, 0x11, TEST + 0x234
    movl $0, PT_PAE + 4
    movl $FRAMES + RW, PT_PAE
    invlpg (%ebx)
    outer32 "supervisor", PF, 5, movl (%ebx), %ecx
    movl $LARGE + PRESENT + FOR_USER, PD_PAE_TEST + 256 * 8
    invlpg (%ebx)
    fault32 "large-read-only", PF, 3, movl %ecx, (%ebx)
    outer32 "large-user", NONE, 0, movl (%ebx), %ecx
    # The four entries at CR3 are registers: a change counts when CR3 is loaded.
    movl $0, PDPT_PAE + 8
    movl $PDPT_PAE, %eax
    movl %eax, %cr3
    fault32 "directory-absent", PF, 0, movl (%ebx), %eax
    finish

# Reserved bits in the entries at CR3. The rig's processor does not look at them.
    case "paging-pae-reserved", mode=PROTECTED, where=NOT_KVM
    movl $PD_PAE + PRESENT, PDPT_PAE
    movl $LARGE + URW, PD_PAE
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $PDPT_PAE, %eax
    movl %eax, %cr3
    movl $PD_PAE + RW, PDPT_PAE + 16
    movl %cr0, %eax
    orl $CR0_PG, %eax
    fault32 "paging-on", GP, 0, movl %eax, %cr0
    movl $0, PDPT_PAE + 16
    fault32 "paging-on-good", NONE, 0, movl %eax, %cr0
    movl $PD_PAE + PRESENT + FOR_USER, PDPT_PAE + 24
    movl $PDPT_PAE, %eax
    fault32 "cr3", GP, 0, movl %eax, %cr3
    movl $0, PDPT_PAE + 24
    fault32 "cr3-good", NONE, 0, movl %eax, %cr3
    finish
    .code64
