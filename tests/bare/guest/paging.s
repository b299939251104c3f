# Page faults with their error codes and CR2, accessed and dirty bits, large pages, and what an
# instruction leaves behind that faults in its middle.
#
# Error code: 1 present, 2 write, 4 user, 8 reserved bit, 0x10 fetch (SDM volume 3, 4.7).

    .set PAGE0, TEST
    .set PAGE1, TEST + 0x1000
    .set PAGE2, TEST + 0x2000
    .set FRAME0, FRAMES
    .set FRAME1, FRAMES + 0x1000
    .set FRAME2, FRAMES + 0x2000

    case "page-fault-cpl-0"
    movl $PAGE0 + 0x123, %ebx
    fault "absent-read", PF, 0, movb (%rbx), %al
    check "absent-read-cr2", last_cr2-org, PAGE0 + 0x123
    fault "absent-write", PF, 2, movb %al, (%rbx)
    fault "absent-modify", PF, 2, lock incb (%rbx)
    fault_to "absent-fetch", PF, 0x10, PAGE0 + 0x123, jmp *%rbx
    check "absent-fetch-cr2", last_cr2-org, PAGE0 + 0x123
    map_test 0, FRAME0 | PRESENT
    fault "read-only-read", NONE, 0, movb (%rbx), %al
    fault "read-only-write", PF, 3, movb %al, (%rbx)
    check "read-only-write-cr2", last_cr2-org, PAGE0 + 0x123
    clear_bits %cr0, CR0_WP
    fault "no-wp-write", NONE, 0, movb %al, (%rbx)
    set_bits %cr0, CR0_WP
    fault "wp-again", PF, 3, movb %al, (%rbx)
    map_test 0, FRAME0 | URW
    fault "user-page-read", NONE, 0, movb (%rbx), %al
    fault "user-page-write", NONE, 0, movb %al, (%rbx)
    movb $0xc3, FRAME0 + 0x123
    fault "user-page-fetch", NONE, 0, call *%rbx
    map_test 0, FRAME0 | RW | NX
    fault "nx-read", NONE, 0, movb (%rbx), %al
    fault_to "nx-fetch", PF, 0x11, PAGE0 + 0x123, jmp *%rbx
    # Reads and writes of the same instruction.
    map_test 0, FRAME0 | PRESENT
    fault "read-only-modify", PF, 3, incb (%rbx)
    fault "read-only-xchg", PF, 3, xchgb %al, (%rbx)
    fault "read-only-cmp", NONE, 0, cmpb %al, (%rbx)
    # The stack.
    map_test 1, FRAME1 | PRESENT
    gate PF, stubs64 + 16 * PF, 0x8e, 1
    recover_at 1f
    movl $PAGE2, %esp
2:  pushq %rax
1:  check_exception "push", PF, 3, 2b-org
    check "push-rsp", last_rsp-org, PAGE2
    check "push-cr2", last_cr2-org, PAGE2 - 8
    recover_at 1f
    movl $PAGE2, %esp
2:  popq %rax
1:  check_exception "pop", PF, 0, 2b-org
    check "pop-rsp", last_rsp-org, PAGE2
    recover_at 1f
    movl $PAGE2, %esp
2:  call no_exception
1:  check_exception "call", PF, 3, 2b-org
    check "call-rsp", last_rsp-org, PAGE2
    recover_at 1f
    movl $PAGE2, %esp
2:  ret
1:  check_exception "ret", PF, 0, 2b-org
    pushq $0x77
    movl $PAGE0 + 0x800, %ebx
    fault "pop-to-memory", PF, 3, popq (%rbx)
    movq %rsp, %rbx
    movq last_rsp-org, %rax
    check_same "pop-to-memory-rsp", %rax, %rbx
    popq %rax
    finish

    case "page-fault-cpl-3"
    movl $PAGE0 + 0x123, %ebx
    user "absent-read", PF, 4, movb (%rbx), %al
    user "absent-write", PF, 6, movb %al, (%rbx)
    check "absent-write-cr2", last_cr2-org, PAGE0 + 0x123
    recover_at 1f
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq $2
    pushq $USER64
    pushq %rbx
    iretq
1:  check_exception "absent-fetch", PF, 0x14, PAGE0 + 0x123
    map_test 0, FRAME0 | RW
    user "supervisor-read", PF, 5, movb (%rbx), %al
    user "supervisor-write", PF, 7, movb %al, (%rbx)
    recover_at 1f
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq $2
    pushq $USER64
    pushq %rbx
    iretq
1:  check_exception "supervisor-fetch", PF, 0x15, PAGE0 + 0x123
    # The same page again, now that CPL 0 has used it.
    movb (%rbx), %al
    user "supervisor-read-cached", PF, 5, movb (%rbx), %al
    map_test 0, FRAME0 | FOR_USER | PRESENT
    user "read-only-read", NONE, 0, movb (%rbx), %al
    user "read-only-write", PF, 7, movb %al, (%rbx)
    clear_bits %cr0, CR0_WP
    user "no-wp-write", PF, 7, movb %al, (%rbx)
    set_bits %cr0, CR0_WP
    map_test 0, FRAME0 | URW
    user "write", NONE, 0, movb %al, (%rbx)
    user "modify", NONE, 0, lock incb (%rbx)
    map_test 0, FRAME0 | URW | NX
    recover_at 1f
    pushq $USERDATA
    pushq $USER + STACK_USER
    pushq $2
    pushq $USER64
    pushq %rbx
    iretq
1:  check_exception "nx-fetch", PF, 0x15, PAGE0 + 0x123
    # All levels must allow it.
    map_test 0, FRAME0 | URW
    set_entry PDE_TEST, PT_TEST | FOR_USER | PRESENT
    invlpg (%rbx)
    user "directory-read-only", PF, 7, movb %al, (%rbx)
    fault "directory-read-only-cpl-0", PF, 3, movb %al, (%rbx)
    set_entry PDE_TEST, PT_TEST | RW
    invlpg (%rbx)
    user "directory-supervisor", PF, 5, movb (%rbx), %al
    set_entry PDE_TEST, PT_TEST | URW | NX
    invlpg (%rbx)
    fault_to "directory-nx", PF, 0x11, PAGE0 + 0x123, jmp *%rbx
    set_entry PDE_TEST, PT_TEST | FOR_USER | WRITE
    invlpg (%rbx)
    user "directory-absent", PF, 4, movb (%rbx), %al
    set_entry PDE_TEST, PT_TEST | URW
    invlpg (%rbx)
    user "directory-again", NONE, 0, movb (%rbx), %al
    finish

# A reserved bit anywhere on the way. Bits that depend on the number of physical address bits are
# left out. The rig's processor does not set the error code's bit 0 here.
    case "page-fault-reserved", where=NOT_KVM
    movl $PAGE0, %ebx
    map_test 0, FRAME0 | URW
    set_entry PDE_LARGE, FRAMES | URW | LARGE | 1 << 13
    movl $TEST_LARGE + 0x1234, %ecx
    fault "large-read", PF, 9, movb (%rcx), %al
    check "large-read-cr2", last_cr2-org, TEST_LARGE + 0x1234
    fault "large-write", PF, 0xb, movb %al, (%rcx)
    user "large-user-read", PF, 0xd, movb (%rcx), %al
    user "large-user-write", PF, 0xf, movb %al, (%rcx)
    fault_to "large-fetch", PF, 0x19, TEST_LARGE + 0x1234, jmp *%rcx
    set_entry PDPTE_HUGE, URW | LARGE | 1 << 20
    movl $TEST_HUGE, %ecx
    fault "huge-read", PF, 9, movl (%rcx), %eax
    call nxe_off
    map_test 0, FRAME0 | URW | NX
    fault "nx-off", PF, 9, movb (%rbx), %al
    finish
nxe_off:
    movl $MSR_EFER, %ecx
    rdmsr
    andl $~0x800, %eax
    wrmsr
    ret

    case "no-execute-off"
    movl $PAGE0, %ebx
    map_test 0, FRAME0 | URW
    fault "on", NONE, 0, movb (%rbx), %al
    call nxe_off
    fault "off", NONE, 0, movb (%rbx), %al
    # There is no fetch bit in error codes then.
    map_test 0, 0
    fault_to "absent-fetch", PF, 0, PAGE0, jmp *%rbx
    # If an entry is not present its other bits mean nothing.
    map_test 0, NX | 1 << 51 | WRITE
    fault "absent-with-bits", PF, 0, movb (%rbx), %al
    finish

# 1 GiB pages.
    case "page-huge"
    need 0x80000001, 0, %edx, 26
    set_entry PDPTE_HUGE, URW | LARGE
    movl $TEST_HUGE + FRAMES + 0x10, %ebx
    movl $0x1234567, FRAMES + 0x10
    movl (%rbx), %eax
    check "read", %rax, 0x1234567
    movq PDPTE_HUGE, %rax
    check "accessed", %rax, URW | LARGE | ACCESSED
    movl $0x89, (%rbx)
    movl FRAMES + 0x10, %eax
    check "write", %rax, 0x89
    movq PDPTE_HUGE, %rax
    check "dirty", %rax, URW | LARGE | ACCESSED | DIRTY
    user "user-read", NONE, 0, movl (%rbx), %eax
    set_entry PDPTE_HUGE, PRESENT | LARGE
    invlpg (%rbx)
    fault "read-only", PF, 3, movl %eax, (%rbx)
    user "supervisor", PF, 5, movl (%rbx), %eax
    set_entry PDPTE_HUGE, URW | LARGE | NX
    invlpg (%rbx)
    fault_to "nx", PF, 0x11, TEST_HUGE + FRAMES + 0x10, jmp *%rbx
    finish

    case "page-large"
    set_entry PDE_LARGE, FRAMES & ~0x1fffff | URW | LARGE
    movl $TEST_LARGE + (FRAMES & 0x1fffff) + 0x3010, %ebx
    movl $0x1234567, FRAMES + 0x3010
    movl (%rbx), %eax
    check "read", %rax, 0x1234567
    movq PDE_LARGE, %rax
    check "accessed", %rax, FRAMES & ~0x1fffff | URW | LARGE | ACCESSED
    movl $0x89, (%rbx)
    movl FRAMES + 0x3010, %eax
    check "write", %rax, 0x89
    movq PDE_LARGE, %rax
    check "dirty", %rax, FRAMES & ~0x1fffff | URW | LARGE | ACCESSED | DIRTY
    movb $0xc3, (%rbx)
    fault "fetch", NONE, 0, call *%rbx
    user "user-read", NONE, 0, movl (%rbx), %eax
    set_entry PDE_LARGE, FRAMES & ~0x1fffff | PRESENT | LARGE
    invlpg (%rbx)
    fault "read-only", PF, 3, movl %eax, (%rbx)
    user "supervisor", PF, 5, movl (%rbx), %eax
    # INVLPG of any address in it drops all of it; the size may change.
    set_entry PDE_LARGE, SPARE_TABLES | URW
    set_entry SPARE_TABLES, FRAME2 | RW
    movl $TEST_LARGE, %ecx
    invlpg 0x1ff000(%rcx)
    invlpg (%rbx)
    movl $0x77, FRAME2
    movl (%rcx), %eax
    check "split", %rax, 0x77
    fault "split-absent", PF, 0, movl (%rbx), %eax
    finish

    case "accessed-dirty"
    movl $PAGE0, %ebx
    map_test 0, FRAME0 | URW
    movb (%rbx), %al
    movq PT_TEST, %rax
    check "read", %rax, FRAME0 | URW | ACCESSED
    movq PDE_TEST, %rax
    check "read-directory", %rax, PT_TEST | URW | ACCESSED
    movb %al, (%rbx)
    movq PT_TEST, %rax
    check "write", %rax, FRAME0 | URW | ACCESSED | DIRTY
    movq PDE_TEST, %rax
    check "write-directory", %rax, PT_TEST | URW | ACCESSED
    # Cleared and invalidated, both are set again.
    map_test 0, FRAME0 | URW
    movb (%rbx), %al
    map_test 0, FRAME0 | URW | ACCESSED
    movb %al, (%rbx)
    movq PT_TEST, %rax
    check "write-again", %rax, FRAME0 | URW | ACCESSED | DIRTY
    # A comparison that fails writes all the same.
    map_test 0, FRAME0 | URW
    movb $1, FRAME0
    movl $2, %eax
    movl $3, %ecx
    lock cmpxchgb %cl, (%rbx)
    movq PT_TEST, %rax
    check "cmpxchg-unequal", %rax, FRAME0 | URW | ACCESSED | DIRTY
    # A write that is not allowed makes nothing dirty, and a page that is absent is left alone.
    map_test 0, FRAME0 | FOR_USER | PRESENT
    fault "read-only", PF, 3, movb %al, (%rbx)
    movq PT_TEST, %rax
    andl $DIRTY, %eax
    check "read-only-dirty", %rax, 0
    map_test 1, FRAME1 | WRITE
    fault "absent", PF, 2, movb %al, PAGE1
    movq PT_TEST + 8, %rax
    check "absent-entry", %rax, FRAME1 | WRITE
    # Fetches, accesses at CPL 3, and the CPU's own.
    movb $0xc3, FRAME2
    map_test 2, FRAME2 | URW
    movl $PAGE2, %ecx
    call *%rcx
    movq PT_TEST + 16, %rax
    check "fetch", %rax, FRAME2 | URW | ACCESSED
    map_test 0, FRAME0 | URW
    user "user-write", NONE, 0, movb %al, (%rbx)
    movq PT_TEST, %rax
    check "user-write-entry", %rax, FRAME0 | URW | ACCESSED | DIRTY
    map_test 0, FRAME0 | RW
    movq $PAGE0 + 0x800, tss-org + 36
    gate UD, stubs64 + 16 * UD, 0x8e, 1
    fault "delivery", UD, 0, ud2
    movq PT_TEST, %rax
    check "delivery-entry", %rax, FRAME0 | RW | ACCESSED | DIRTY
    map_test 0, FRAME0 | RW
    movw $0x1ff, new_gdt-org
    movl $FRAME0, %edi
    movl $gdt-org, %esi
    movl $(gdt_end - gdt) / 8, %ecx
    rep movsq
    set_entry FRAME0 + SPARE, 0x00cf92000000ffff
    movl $PAGE0, new_gdt-org + 2
    lgdt new_gdt-org
    movl $SPARE, %eax
    movl %eax, %es
    movq PT_TEST, %rax
    check "descriptor-accessed", %rax, FRAME0 | RW | ACCESSED | DIRTY
    movzbl FRAME0 + SPARE + 5, %eax
    check "descriptor", %rax, 0x93
    lgdt gdt_pointer-org
    finish
    .balign 8
new_gdt:
    .short 0
    .quad 0

    case "smep"
    need 7, 0, %ebx, 7
    movb $0xc3, FRAME0
    map_test 0, FRAME0 | URW
    movl $PAGE0, %ebx
    fault "off", NONE, 0, call *%rbx
    set_bits %cr4, CR4_SMEP
    fault_to "fetch", PF, 0x11, PAGE0, jmp *%rbx
    fault "read", NONE, 0, movb (%rbx), %al
    map_test 0, FRAME0 | RW
    fault "supervisor-page", NONE, 0, call *%rbx
    clear_bits %cr4, CR4_SMEP
    map_test 0, FRAME0 | URW
    fault "off-again", NONE, 0, call *%rbx
    finish

    case "smap"
    need 7, 0, %ebx, 20
    map_test 0, FRAME0 | URW
    map_test 1, FRAME1 | RW
    movl $PAGE0, %ebx
    fault "off", NONE, 0, movb (%rbx), %al
    fault "clac-off", NONE, 0, clac
    set_bits %cr4, CR4_SMAP
    fault "read", PF, 1, movb (%rbx), %al
    fault "write", PF, 3, movb %al, (%rbx)
    check "write-cr2", last_cr2-org, PAGE0
    fault "supervisor-page", NONE, 0, movb 0x1000(%rbx), %al
    stac
    fault "stac-read", NONE, 0, movb (%rbx), %al
    stac
    fault "stac-write", NONE, 0, movb %al, (%rbx)
    clac
    fault "clac", PF, 1, movb (%rbx), %al
    pushq $FLAG_AC | 2
    popfq
    fault "popf", NONE, 0, movb (%rbx), %al
    user "user", NONE, 0, movb (%rbx), %al
    user "user-stac", UD, 0, stac
    finish

# What the CPU accesses by itself, here an LDT, counts as an access of CPL 0, without regard to AC.
    case "smap-implicit"
    need 7, 0, %ebx, 20
    map_test 0, FRAME0 | URW
    set_entry FRAME0 + 8, 0x00cff3000000ffff
    movw $0, ldt_descriptor-org+2
    movb $PAGE0 >> 24, ldt_descriptor-org+7
    movl $LDT, %eax
    lldt %ax
    movl $0xf, %ecx
    fault "off", NONE, 0, movl %ecx, %ds
    user "off-user", NONE, 0, movl %ecx, %ds
    set_bits %cr4, CR4_SMAP
    fault "on", PF, 1, movl %ecx, %ds
    check "on-cr2", last_cr2-org, PAGE0 + 8
    movq $FLAG_AC | 2, user_flags-org
    user "on-user", PF, 1, movl %ecx, %ds
    finish

# The rig's processor looks at AC if CPL is 0.
    case "smap-implicit-ac", where=NOT_KVM
    need 7, 0, %ebx, 20
    map_test 0, FRAME0 | URW
    set_entry FRAME0 + 8, 0x00cff3000000ffff
    movw $0, ldt_descriptor-org+2
    movb $PAGE0 >> 24, ldt_descriptor-org+7
    movl $LDT, %eax
    lldt %ax
    set_bits %cr4, CR4_SMAP
    stac
    movl $0xf, %ecx
    fault "ldt", PF, 1, movl %ecx, %ds
    stac
    fault "explicit", NONE, 0, movl PAGE0, %eax
    finish

# An access over the end of a page.
    case "page-crossing"
    map_test 0, FRAME0 | RW
    movq $-1, FRAME0 + 0xff8
    movl $PAGE1 - 4, %ebx
    movabsq $0x1122334455667788, %rax
    fault "write", PF, 2, movq %rax, (%rbx)
    check "write-cr2", last_cr2-org, PAGE1
    movq FRAME0 + 0xff8, %rcx
    check "write-first-page", %rcx, 0xffffffffffffffff
    fault "read", PF, 0, movq (%rbx), %rcx
    check "read-cr2", last_cr2-org, PAGE1
    map_test 1, FRAME1 | PRESENT
    fault "read-only", PF, 3, movq %rax, (%rbx)
    fault "read-only-modify", PF, 3, addq %rax, (%rbx)
    check "modify-cr2", last_cr2-org, PAGE1
    fault "read-only-locked", PF, 3, lock xaddq %rax, (%rbx)
    movq FRAME0 + 0xff8, %rcx
    check "modify-first-page", %rcx, 0xffffffffffffffff
    check "modify-register", %rax, 0x1122334455667788
    map_test 1, FRAME1 | RW
    # The two frames do not follow each other.
    map_test 1, FRAME2 | RW
    movl $0x55667788, FRAME1
    fault "both", NONE, 0, movq %rax, (%rbx)
    movl FRAME0 + 0xffc, %ecx
    check "both-first", %rcx, 0x55667788
    movl FRAME2, %ecx
    check "both-second", %rcx, 0x11223344
    movl FRAME1, %ecx
    check "both-beside", %rcx, 0x55667788
    movq (%rbx), %rcx
    check "both-read", %rcx, 0x1122334455667788
    movw -1(%rbx), %cx
    movups %xmm0, -6(%rbx)
    map_test 1, 0
    pxor %xmm0, %xmm0
    fault "sse-write", PF, 2, movups %xmm0, -9(%rbx)
    map_test 1, FRAME2 | RW
    # An instruction whose last byte is on a page that is absent.
    movl $0x000001b8, FRAME0 + 0xffc          # mov eax, 1
    movb $0xc3, FRAME2 + 1
    movb $0, FRAME2
    fault "fetch-both", NONE, 0, call *%rbx
    map_test 1, 0
    fault_to "fetch", PF, 0x10, PAGE1 - 4, jmp *%rbx
    check "fetch-cr2", last_cr2-org, PAGE1
    finish

# Repeated string instructions stop with exact registers, and go on.
    case "string-faults"
    map_test 0, FRAME0 | RW
    movl $0x11, FRAME0
    movl $PAGE1 - 16, %edi
    movl $FRAMES + 0x4000, %esi
    movl $10, %ecx
    fault "movs", PF, 2, rep movsl
    check "movs-rcx", last_registers-org+8, 6
    check "movs-rsi", last_registers-org+48, FRAMES + 0x4010
    check "movs-rdi", last_registers-org+56, PAGE1
    check "movs-cr2", last_cr2-org, PAGE1
    movl $PAGE1 - 7, %edi
    movl $10, %ecx
    movb $0x5a, %al
    fault "stos", PF, 2, rep stosb
    check "stos-rcx", last_registers-org+8, 3
    check "stos-rdi", last_registers-org+56, PAGE1
    movb FRAME0 + 0xfff, %al
    movzbl %al, %eax
    check "stos-last", %rax, 0x5a
    movl $PAGE1 - 6, %esi
    movl $100, %ecx
    fault "lods", PF, 0, rep lodsw
    check "lods-rcx", last_registers-org+8, 97
    check "lods-rsi", last_registers-org+48, PAGE1
    movl $PAGE1 - 6, %edi
    movl $100, %ecx
    movl $0x5a5a, %eax
    fault "scas", PF, 0, repe scasw
    check "scas-rcx", last_registers-org+8, 97
    movl $PAGE1 - 2, %esi
    movl $FRAME0 + 0xffe, %edi
    movl $9, %ecx
    fault "cmps", PF, 0, repe cmpsb
    check "cmps-rcx", last_registers-org+8, 7
    check "cmps-rdi", last_registers-org+56, FRAME0 + 0x1000
    # Downwards.
    map_test 2, FRAME2 | RW
    movl $PAGE2 + 8, %edi
    movl $5, %ecx
    std
    fault "stos-down", PF, 2, rep stosq
    cld
    check "stos-down-rcx", last_registers-org+8, 3
    check "stos-down-rdi", last_registers-org+56, PAGE2 - 8
    # An element over the end of the page leaves nothing.
    movl $0, FRAME0 + 0xffc
    movl $PAGE1 - 6, %edi
    movl $3, %ecx
    movl $-1, %eax
    fault "stos-crossing", PF, 2, rep stosl
    check "stos-crossing-rcx", last_registers-org+8, 2
    check "stos-crossing-rdi", last_registers-org+56, PAGE1 - 2
    movl FRAME0 + 0xffc, %eax
    check "stos-crossing-memory", %rax, 0xffff
    # A handler maps the page, and the instruction goes on.
    gate PF, map_and_return
    movl $PAGE1 - 16, %edi
    movl $FRAMES + 0x4000, %esi
    movl $0x400, %ecx
    rep movsl
    check "resumed-rcx", %rcx, 0
    check "resumed-rdi", %rdi, PAGE1 + 0xff0
    check "resumed-faults", faults-org, 1
    finish
    .balign 8
faults:
    .quad 0
map_and_return:
    incq faults-org
    map_test 1, FRAME1 | RW
    addq $8, %rsp
    iretq

# INS and OUTS of a page that is absent: the port must not be read.
    case "string-io-faults"
    movl $PAGE0, %edi
    movl $PAGE0, %esi
    movl $0x60, %edx
    movl $3, %ecx
    fault "ins", PF, 2, rep insb
    check "ins-rcx", last_registers-org+8, 3
    fault "outs", PF, 0, rep outsb
    map_test 0, FRAME0 | RW
    rep insb
    movl FRAME0, %eax
    check "ins-data", %rax, 0x606060
    movl $PAGE0, %edi
    movl $2, %ecx
    rep insl
    movl FRAME0, %eax
    check "ins-dwords", %rax, 0x63626160
    check "ins-rdi", %rdi, PAGE0 + 8
    finish

# Stale translations. That translations outlive a change is not guaranteed, so only what must be
# gone is looked at.
    case "translation-cache"
    movl $0x11, FRAME0
    movl $0x22, FRAME1
    movl $0x33, FRAME2
    movl $PAGE0, %ebx
    # An absent page is never cached.
    fault "absent", PF, 0, movl (%rbx), %eax
    set_entry PT_TEST, FRAME0 | RW
    movl (%rbx), %eax
    check "made-present", %rax, 0x11
    map_test 0, FRAME1 | RW
    movl (%rbx), %eax
    check "invlpg", %rax, 0x22
    set_entry PT_TEST, FRAME2 | RW
    movq %cr3, %rax
    movq %rax, %cr3
    movl (%rbx), %eax
    check "cr3", %rax, 0x33
    set_entry PT_TEST, FRAME0 | RW
    set_bits %cr4, CR4_PGE
    movl (%rbx), %eax
    check "pge-on", %rax, 0x11
    set_entry PT_TEST, FRAME1 | RW | GLOBAL
    invlpg (%rbx)
    movl (%rbx), %eax
    set_entry PT_TEST, FRAME2 | RW | GLOBAL
    clear_bits %cr4, CR4_PGE
    movl (%rbx), %eax
    check "pge-off", %rax, 0x33
    set_bits %cr4, CR4_PGE
    movl (%rbx), %eax
    set_entry PT_TEST, FRAME0 | RW | GLOBAL
    invlpg (%rbx)
    movl (%rbx), %eax
    check "invlpg-global", %rax, 0x11
    clear_bits %cr4, CR4_PGE
    # Rights that are taken away.
    map_test 0, FRAME0 | PRESENT
    fault "read-only", PF, 3, movl %eax, (%rbx)
    map_test 0, 0
    fault "gone", PF, 0, movl (%rbx), %eax
    # A change of a directory entry and INVLPG of one page beneath.
    movl $0x44, FRAMES + 0x5000
    set_entry PT_TEST + 8, FRAME1 | RW
    movl PAGE1, %eax
    set_entry SPARE_TABLES + 8, FRAMES + 0x5000 + RW
    set_entry PDE_TEST, SPARE_TABLES | URW
    invlpg PAGE1
    movl PAGE1, %eax
    check "directory", %rax, 0x44
    set_entry PDE_TEST, PT_TEST | URW
    movq %cr3, %rax
    movq %rax, %cr3
    movl PAGE1, %eax
    check "directory-cr3", %rax, 0x22
    # Another address space.
    movl $PML4, %esi
    movl $SPARE_TABLES + 0x1000, %edi
    movl $512, %ecx
    rep movsq
    movl $PDPT, %esi
    movl $SPARE_TABLES + 0x2000, %edi
    movl $512, %ecx
    rep movsq
    movl $PD_USER, %esi
    movl $SPARE_TABLES + 0x3000, %edi
    movl $512, %ecx
    rep movsq
    set_entry SPARE_TABLES + 0x1000, SPARE_TABLES + 0x2000 + URW
    set_entry SPARE_TABLES + 0x2008, SPARE_TABLES + 0x3000 + URW
    set_entry SPARE_TABLES + 0x3000 + 256 * 8, SPARE_TABLES + URW
    movl $SPARE_TABLES + 0x1000, %eax
    movq %rax, %cr3
    movl PAGE1, %eax
    check "other-space", %rax, 0x44
    movl $PML4, %eax
    movq %rax, %cr3
    movl PAGE1, %eax
    check "first-space", %rax, 0x22
    # A code page that is mapped elsewhere.
    movl $0xc3010190, FRAMES + 0x5000       # nop; add eax, [ecx]; ret
    movl $0xc302b090, FRAMES + 0x6000       # nop; mov al, 2; ret
    movl $0xc301b090, FRAMES + 0x5000       # nop; mov al, 1; ret
    map_test 2, FRAMES + 0x5000 + RW
    movl $PAGE2, %ecx
    xorl %eax, %eax
    call *%rcx
    check "code-first", %rax, 1
    map_test 2, FRAMES + 0x6000 + RW
    call *%rcx
    check "code-second", %rax, 2
    finish

    case "process-context"
    need 1, 0, %ecx, 17
    movl $0x11, FRAME0
    movl $0x22, FRAME1
    movl $PAGE0, %ebx
    movl $PML4 + 1, %eax
    movq %rax, %cr3
    movq %cr4, %rax
    orl $CR4_PCIDE, %eax
    fault "pcide-with-pcid", GP, 0, movq %rax, %cr4
    movl $PML4, %eax
    movq %rax, %cr3
    set_bits %cr4, CR4_PCIDE
    map_test 0, FRAME0 | RW
    movl (%rbx), %eax
    check "pcid-0", %rax, 0x11
    # Without bit 63 the new space's translations are dropped.
    movl $PML4 + 5, %eax
    movq %rax, %cr3
    movl (%rbx), %eax
    set_entry PT_TEST, FRAME1 | RW
    movl $PML4 + 5, %eax
    movq %rax, %cr3
    movl (%rbx), %eax
    check "cr3", %rax, 0x22
    movq %cr3, %rax
    check "cr3-value", %rax, PML4 + 5
    # With it they may be kept, and INVLPG takes one page of the current space.
    set_entry PT_TEST, FRAME0 | RW
    invlpg (%rbx)
    movabsq $1 << 63 | PML4 + 5, %rax
    movq %rax, %cr3
    movl (%rbx), %eax
    check "cr3-kept", %rax, 0x11
    movq %cr3, %rax
    check "cr3-kept-value", %rax, PML4 + 5
    # Bits 3 and 4 belong to the identifier.
    movl $PML4 + 0xfff, %eax
    movq %rax, %cr3
    movl (%rbx), %eax
    check "pcid-fff", %rax, 0x11
    # PCIDE going off drops everything; clearing paging is not allowed.
    movl $PML4, %eax
    movq %rax, %cr3
    set_entry PT_TEST, FRAME1 | RW
    clear_bits %cr4, CR4_PCIDE
    movl (%rbx), %eax
    check "pcide-off", %rax, 0x22
    finish

    case "invpcid"
    need 1, 0, %ecx, 17
    need 7, 0, %ebx, 10
    movl $0x11, FRAME0
    movl $0x22, FRAME1
    set_bits %cr4, CR4_PCIDE
    movl $PAGE0, %ebx
    movl $invpcid_operand-org, %esi
    .irp kind, 0, 1, 2, 3
    map_test 0, FRAME0 | RW
    movl (%rbx), %eax
    set_entry PT_TEST, FRAME1 | RW
    movl $\kind, %ecx
    invpcid (%rsi), %rcx
    movl (%rbx), %eax
    check "kind-\kind", %rax, 0x22
    .endr
    movl $4, %ecx
    fault "kind-4", GP, 0, invpcid (%rsi), %rcx
    movq $0x1000, invpcid_operand-org
    movl $1, %ecx
    fault "reserved", GP, 0, invpcid (%rsi), %rcx
    movq $0, invpcid_operand-org
    movabsq $0x800000000000, %rax
    movq %rax, invpcid_operand-org+8
    xorl %ecx, %ecx
    fault "non-canonical", GP, 0, invpcid (%rsi), %rcx
    user "user", GP, 0, invpcid (%rsi), %rcx
    finish
    .balign 16
invpcid_operand:
    .quad 0, PAGE0
