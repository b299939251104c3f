# What CPL 3 may not do, and the ways between privilege levels and code sizes in long mode.

    case "cpl-3-instructions"
    movl $DATA, %eax
    movl $gdt_pointer-org+USER, %ebx
    movl $MSR_EFER, %ecx
    user "hlt", GP, 0, hlt
    user "cli", GP, 0, cli
    user "sti", GP, 0, sti
    user "lgdt", GP, 0, lgdt (%rbx)
    user "lidt", GP, 0, lidt (%rbx)
    user "lldt", GP, 0, lldt %ax
    user "ltr", GP, 0, ltr %ax
    user "lmsw", GP, 0, lmsw %ax
    user "clts", GP, 0, clts
    user "invd", GP, 0, invd
    user "wbinvd", GP, 0, wbinvd
    user "invlpg", GP, 0, invlpg (%rbx)
    user "mov-from-cr0", GP, 0, movq %cr0, %rdx
    user "mov-to-cr0", GP, 0, movq %rdx, %cr0
    user "mov-from-cr3", GP, 0, movq %cr3, %rdx
    user "mov-from-cr8", GP, 0, movq %cr8, %rdx
    user "mov-from-dr7", GP, 0, movq %dr7, %rdx
    user "mov-to-dr0", GP, 0, movq %rdx, %dr0
    user "rdmsr", GP, 0, rdmsr
    user "wrmsr", GP, 0, wrmsr
    user "swapgs", GP, 0, swapgs
    user "sysretq", GP, 0, sysretq
    user "in", GP, 0, inb $0x60, %al
    user "out", GP, 0, outb %al, $0x60
    user "ins", GP, 0, insb
    user "int-dpl-3", NONE, 0, int $BACK
    user "load-dpl-0", GP, DATA, movl %eax, %ds
    user "load-ss-dpl-0", GP, DATA, movl %eax, %ss
    # What it may.
    user "sgdt", NONE, 0, sgdt FRAMES+USER
    user "sidt", NONE, 0, sidt FRAMES+USER
    user "smsw", NONE, 0, smsw %eax
    user "str", NONE, 0, str %eax
    user "sldt", NONE, 0, sldt %eax
    user "cpuid", NONE, 0, cpuid
    user "rdtsc", NONE, 0, rdtsc
    user "fninit", NONE, 0, fninit
    user "ud2", UD, 0, ud2
    movabsq $0x800000000000, %rdi
    user "non-canonical-write", GP, 0, movb %al, (%rdi)
    set_bits %cr4, 4
    user "rdtsc-tsd", GP, 0, rdtsc
    fault "rdtsc-tsd-cpl-0", NONE, 0, rdtsc
    clear_bits %cr4, 4
    finish

    case "cpl-3-frame"
    user "ud2", UD, 0, ud2
    check "cs", last_cs-org, USER64
    check "ss", last_ss-org, USERDATA
    check "rsp", last_rsp-org, USER + STACK_USER
    check "handler-rsp", handler_rsp-org, STACK_RSP0
    # SS is null in the handler.
    gate UD, 1f
    recover_at 3f
    enter_user 2f
    finish
2:  ud2
1:  movl %ss, %eax
    movl %cs, %ecx
    addq $24, %rsp
    check "handler-ss", %rax, 0
    check "handler-cs", %rcx, CODE64
    finish
3:

# Flags that CPL 3 cannot change, and those that IRET to it sets.
    case "cpl-3-flags"
    movq $FLAG_IF | FLAG_DF | FLAG_CF | 2, user_flags-org
    enter_user 1f
    jmp 2f
1:  pushq $FLAG_IOPL3 | FLAG_OF
    popfq
    pushfq
    popq %rbx
    ud2
2:  movq last_flags-org, %rax
    andq $~FLAG_RF, %rax
    check "iopl-and-if-kept", %rax, FLAG_IF | FLAG_OF | 2
    check "pushf", %rbx, FLAG_IF | FLAG_OF | 2
    # With IOPL 3 it controls IF, but never IOPL.
    movq $FLAG_IOPL3 | FLAG_IF | 2, user_flags-org
    enter_user 1f
    jmp 2f
1:  cli
    pushfq
    popq %rbx
    pushq $FLAG_IF
    popfq
    ud2
2:  movq last_flags-org, %rax
    andq $~FLAG_RF, %rax
    check "iopl-3-cli", %rbx, FLAG_IOPL3 | 2
    check "iopl-3-popf", %rax, FLAG_IOPL3 | FLAG_IF | 2
    user "iopl-3-in", NONE, 0, inb $0x61, %al
    movzbl %al, %eax
    check "iopl-3-in-value", %rax, 0x61
    user "iopl-3-hlt", GP, 0, hlt
    # IRET at CPL 3: as POPF.
    movq $2, user_flags-org
    enter_user 1f
    jmp 2f
1:  movq %rsp, %rax
    pushq $USERDATA
    pushq %rax
    pushq $FLAG_IF | FLAG_IOPL3 | FLAG_DF
    pushq $USER64
    leaq 3f(%rip), %rax
    pushq %rax
    iretq
3:  pushfq
    popq %rbx
    cld
    int $BACK
2:  check "iret", %rbx, FLAG_DF | 2
    finish

    case "io-permission"
    # Without this the rig's processor takes the register for one without a map.
    movb $0x89, tss_descriptor-org+5
    movl $TSS, %eax
    ltr %ax
    andb $0xfe, tss_io-org + (0x60 >> 3)
    user "byte", NONE, 0, inb $0x60, %al
    user "byte-beside", GP, 0, inb $0x61, %al
    user "word", GP, 0, inw $0x60, %ax
    andb $0xf0, tss_io-org + (0x60 >> 3)
    user "dword", NONE, 0, inl $0x60, %eax
    check "dword-value", %rax, 0x63626160
    movl $0x62, %edx
    user "dword-beyond", GP, 0, inl %dx, %eax
    user "word-by-dx", NONE, 0, outw %ax, %dx
    movl $FRAMES + USER, %edi
    movl $2, %ecx
    user "ins", NONE, 0, rep insw
    check "ins-value", FRAMES, 0x63626362
    # Over a byte of the map, and beyond its end.
    andb $0x7f, tss_io-org + 0xf
    andb $0xfe, tss_io-org + 0x10
    movl $0x7f, %edx
    user "two-bytes", NONE, 0, inw %dx, %ax
    movl $0x400, %edx
    user "beyond-map", GP, 0, inb %dx, %al
    movl $0xffff, %edx
    user "far-beyond", GP, 0, inb %dx, %al
    fault "cpl-0", NONE, 0, inb %dx, %al
    # A map that begins beyond the limit allows nothing.
    movw $0x200, tss-org + 102
    user "no-map", GP, 0, inb $0x60, %al
    finish

    case "syscall"
    movl $MSR_STAR, %ecx
    xorl %eax, %eax
    movl $CODE64 | (USER32 << 16), %edx
    wrmsr
    write_msr MSR_LSTAR, (2f-org)
    write_msr MSR_SFMASK, (FLAG_IF | FLAG_DF | FLAG_TF)
    movq $FLAG_IF | FLAG_DF | FLAG_CF | 2, user_flags-org
    movq $FLAG_IF | FLAG_DF | FLAG_CF | 2, %rdi
    enter_user 1f
    jmp 3f
1:  syscall
.Lbehind_syscall:
    movq %r11, %rbp
    ud2
2:  # At the entry point RSP is still the user's.
    movq %rsp, %rbx
    movl $STACK, %esp
    pushfq
    popq %rax
    check "rsp", %rbx, USER + STACK_USER
    andl $FLAG_IF | FLAG_DF, %eax
    check "flags", %rax, 0
    check "r11", %r11, FLAG_IF | FLAG_DF | FLAG_CF | 2
    check_address "rcx", %rcx, .Lbehind_syscall - org + USER
    movl %cs, %eax
    check "cs", %rax, CODE64
    movl %ss, %eax
    check "ss", %rax, DATA
    movq $FLAG_IF | FLAG_OF | 2, %r11
    movq %rbx, %rsp
    sysretq
3:  cld
    check_exception "sysret", UD, 0, (.Lbehind_syscall + 3 - org + USER)
    check "sysret-cs", last_cs-org, USER64
    check "sysret-ss", last_ss-org, USERDATA
    movq last_flags-org, %rax
    andq $~FLAG_RF, %rax
    check "sysret-flags", %rax, FLAG_IF | FLAG_OF | 2
    # To 32-bit code.
    write_msr MSR_LSTAR, (2f-org)
    enter_user 1f
    jmp 3f
1:  syscall
2:  movl $4f-org+USER, %ecx
    movq $2, %r11
    sysretl
    .code32
4:  movl $0x12345678, %ebx
    decl %ebx                       # one byte: a REX prefix in 64-bit code
    int $BACK
    .code64
3:  check "sysret-32-cs", last_cs-org, USER32
    check "sysret-32-ss", last_ss-org, USERDATA
    check "sysret-32-code", last_registers-org+24, 0x12345677
    movl $MSR_EFER, %ecx
    rdmsr
    andl $~1, %eax
    wrmsr
    fault "off", UD, 0, syscall
    fault "sysret-off", UD, 0, sysretq
    user "off-user", UD, 0, syscall
    finish

# Flags that SFMASK does not name are kept. The rig's processor clears the arithmetic ones.
    case "syscall-flags", where=NOT_KVM
    movl $MSR_STAR, %ecx
    xorl %eax, %eax
    movl $CODE64 | (USER32 << 16), %edx
    wrmsr
    write_msr MSR_LSTAR, (2f-org)
    write_msr MSR_SFMASK, (FLAG_IF | FLAG_ZF)
    movq $FLAG_IF | FLAG_ZF | FLAG_CF | FLAG_OF | 2, user_flags-org
    enter_user 1f
1:  syscall
2:  movl $STACK, %esp
    pushfq
    popq %rax
    check "flags", %rax, FLAG_CF | FLAG_OF | 2
    finish

# Processors of AMD have no SYSENTER in long mode. Where it is undefined, KVM tries to emulate it.
# It cannot.
    case "sysenter-amd", where=NOT_KVM
    xorl %eax, %eax
    cpuid
    cmpl $0x68747541, %ebx          # "Auth"
    je 1f
    call not_offered
1:  write_msr MSR_SYSENTER_CS, CODE64
    fault "64-bit", UD, 0, sysenter
    fault "sysexit", UD, 0, sysexitl
    user32 "32-bit", UD, 0, sysenter
    finish

    case "sysenter"
    xorl %eax, %eax
    cpuid
    cmpl $0x756e6547, %ebx          # "Genu"
    je 1f
    call not_offered
1:  write_msr MSR_SYSENTER_CS, CODE64
    write_msr MSR_SYSENTER_ESP, STACK
    write_msr MSR_SYSENTER_EIP, (2f-org)
    movq $FLAG_IF | FLAG_CF | 2, user_flags-org
    enter_user 1f
    jmp 3f
1:  sysenter
2:  pushfq
    popq %rax
    check "flags", %rax, FLAG_CF | 2
    check "rsp", %rsp, STACK
    movl %cs, %eax
    check "cs", %rax, CODE64
    movl %ss, %eax
    check "ss", %rax, DATA
    movl $4f-org+USER, %edx
    movl $USER + STACK_USER, %ecx
    sysexitq
4:  ud2
3:  check_address "sysexit-rip", last_rip-org, 4b-org+USER
    check "sysexit-rsp", last_rsp-org, USER + STACK_USER
    # Selectors are fixed distances from SYSENTER_CS.
    check "sysexit-cs", last_cs-org, CODE64 + 32 + 3
    check "sysexit-ss", last_ss-org, CODE64 + 40 + 3
    write_msr MSR_SYSENTER_EIP, (2f-org)
    enter_user 1f, USER32
    jmp 3f
    .code32
1:  sysenter
    .code64
2:  movl $4f-org+USER, %edx
    movl $USER + STACK_USER, %ecx
    sysexitl
    .code32
4:  movl $0x12345678, %ebx
    decl %ebx
    int $BACK
    .code64
3:  check "sysexit-32-cs", last_cs-org, CODE64 + 16 + 3
    check "sysexit-32-ss", last_ss-org, CODE64 + 24 + 3
    check "sysexit-32-code", last_registers-org+24, 0x12345677
    write_msr MSR_SYSENTER_CS, 0
    fault "no-cs", GP, 0, sysenter
    fault "sysexit-no-cs", GP, 0, sysexitq
    write_msr MSR_SYSENTER_CS, CODE64
    user "sysexit-cpl-3", GP, 0, sysexitq
    finish

    case "call-gate"
    # 64-bit gates, DPL 3 and DPL 0.
    movl $1f-org, %eax
    movl $spare-org, %edi
    movw %ax, (%rdi)
    movw $CODE64, 2(%rdi)
    movw $0xec00, 4(%rdi)
    shrl $16, %eax
    movw %ax, 6(%rdi)
    movq $0, 8(%rdi)
    movq (%rdi), %rax
    movq %rax, 16(%rdi)
    movb $0x8c, 16+5(%rdi)
    movq $0, 24(%rdi)
    # From CPL 0 the stack stays.
    movw $SPARE, far_pointer-org+4
    lcalll *far_pointer-org
2:  check "same-level-offset", %rax, 0
    # From CPL 3.
    movw $SPARE + 3, far_pointer-org+4
    enter_user 3f
    jmp 4f
3:  lcalll *far_pointer-org+USER
.Lbehind_gate:
    ud2
1:  movl %cs, %eax
    testl $3, 8(%rsp)
    jnz 1f
    # Called from CPL 0.
    movq (%rsp), %rbx
    check_address "same-level-return", %rbx, 2b-org
    movq 8(%rsp), %rbx
    check "same-level-cs", %rbx, CODE64
    check "same-level-rsp", %rsp, STACK - 16
    xorl %eax, %eax
    lretq
1:  check "cs", %rax, CODE64
    movl %ss, %eax
    check "ss", %rax, 0
    check "rsp", %rsp, STACK_RSP0 - 32
    movq (%rsp), %rax
    check_address "pushed-rip", %rax, .Lbehind_gate - org + USER
    movq 8(%rsp), %rax
    check "pushed-cs", %rax, USER64
    movq 16(%rsp), %rax
    check "pushed-rsp", %rax, USER + STACK_USER
    movq 24(%rsp), %rax
    check "pushed-ss", %rax, USERDATA
    # Back, with a segment register that CPL 3 may not keep.
    movl $DATA, %eax
    movl %eax, %es
    lretq
4:  check_exception "lret", UD, 0, (.Lbehind_gate - org + USER)
    check "lret-cs", last_cs-org, USER64
    check "lret-ss", last_ss-org, USERDATA
    check "lret-rsp", last_rsp-org, USER + STACK_USER
    movl %es, %eax
    check "lret-es-cleared", %rax, 0
    movw $SPARE + 16 + 3, far_pointer-org+4
    user "dpl-0", GP, SPARE + 16, lcalll *far_pointer-org+USER
    movb $0x6c, spare-org+5
    movw $SPARE + 3, far_pointer-org+4
    user "not-present", NP, SPARE, lcalll *far_pointer-org+USER
    movb $0xec, spare-org+5
    movw $CODE32, spare-org+2
    user "to-32-bit-code", GP, CODE32, lcalll *far_pointer-org+USER
    finish

# Conforming code runs at the caller's level.
    case "conforming"
    set_entry spare-org, 0x00209f0000000000
    movw $SPARE + 3, far_pointer-org+4
    movl $1f-org+USER, far_pointer-org
    enter_user 2f
    jmp 3f
2:  ljmpl *far_pointer-org+USER
1:  ud2
3:  check "cs", last_cs-org, SPARE + 3
    check_address "rip", last_rip-org, 1b-org+USER
    finish

# LAR, LSL, VERR, VERW tell with ZF whether a selector may be used. LAR leaves undefined what lies
# where the limit is.
    case "selector-questions"
    set_entry spare-org, 0x00cf98000000ffff         # execute only
    set_entry spare-org+8, 0x00c0f1000000ffff       # read only, 256 MiB
    set_entry spare-org+16, 0x0000120000001234      # not present data
    .macro ask name, insn, selector, flag, value, mask=0
    movl $\selector, %ecx
    movl $0x55555555, %eax
    \insn
    setz %dl
    movzbl %dl, %edx
    .if \mask
    andl $\mask, %eax
    .endif
    check "\name-zf", %rdx, \flag
    check "\name", %rax, \value
    .endm
    ask "lar-code", "larl %ecx, %eax", CODE64, 1, 0x00209b00
    ask "lar-data", "larl %ecx, %eax", DATA, 1, 0x00c09300, 0xfff0ff00
    ask "lar-null", "larl %ecx, %eax", 0, 0, 0x55555555
    ask "lar-beyond", "larl %ecx, %eax", 0x1238, 0, 0x55555555
    ask "lar-tss", "larl %ecx, %eax", TSS, 1, 0x00008b00
    ask "lar-ldt", "larl %ecx, %eax", LDT, 1, 0x00008200
    ask "lar-not-present", "larl %ecx, %eax", SPARE + 16, 1, 0x00001200
    ask "lar-rpl-3", "larl %ecx, %eax", DATA + 3, 0, 0x55555555
    ask "lsl-data", "lsll %ecx, %eax", DATA, 1, 0xffffffff
    ask "lsl-bytes", "lsll %ecx, %eax", SPARE + 16, 1, 0x1234
    ask "lsl-pages", "lsll %ecx, %eax", SPARE + 8, 1, 0x0fffffff
    ask "lsl-tss", "lsll %ecx, %eax", TSS, 1, TSS_LIMIT
    ask "verr-data", "verr %cx", DATA, 1, 0x55555555
    ask "verr-code", "verr %cx", CODE64, 1, 0x55555555
    ask "verr-execute-only", "verr %cx", SPARE, 0, 0x55555555
    ask "verr-tss", "verr %cx", TSS, 0, 0x55555555
    ask "verw-data", "verw %cx", DATA, 1, 0x55555555
    ask "verw-read-only", "verw %cx", SPARE + 8, 0, 0x55555555
    ask "verw-code", "verw %cx", CODE64, 0, 0x55555555
    finish

    case "system-segments"
    str %eax
    check "str", %rax, TSS
    sldt %eax
    check "sldt", %rax, 0
    movl $LDT, %eax
    lldt %ax
    sldt %ecx
    check "lldt", %rcx, LDT
    movl $0xc, %eax
    fault "ldt-data", NONE, 0, movl %eax, %fs
    movl %fs, %ecx
    check "ldt-selector", %rcx, 0xc
    movl $0x1c, %eax
    fault "ldt-beyond", GP, 0x1c, movl %eax, %fs
    movl $4, %eax
    fault "ldt-zero-descriptor", GP, 4, movl %eax, %fs
    # Code in the LDT.
    movw $0x14, far_pointer-org+4
    movl $1f-org, far_pointer-org
    ljmpl *far_pointer-org
1:  movl %cs, %ecx
    check "ldt-code", %rcx, 0x14
    pushq $CODE64
    pushq $2f-org
    lretq
2:  movl $DATA, %eax
    fault "lldt-data", GP, DATA, lldt %ax
    movl $TSS, %eax
    fault "lldt-tss", GP, TSS, lldt %ax
    movl $0x1238, %eax
    fault "lldt-beyond", GP, 0x1238, lldt %ax
    movl $0xc, %eax
    fault "lldt-in-ldt", GP, 0xc, lldt %ax
    andb $0x7f, ldt_descriptor-org+5
    movl $LDT, %eax
    fault "lldt-not-present", NP, LDT, lldt %ax
    xorl %eax, %eax
    fault "lldt-null", NONE, 0, lldt %ax
    sldt %ecx
    check "lldt-null-sldt", %rcx, 0
    movl $0xc, %eax
    fault "no-ldt", GP, 0xc, movl %eax, %fs
    # The descriptor of the task register becomes busy, and a busy one cannot be loaded.
    movl $TSS, %eax
    movb $0x89, tss_descriptor-org+5
    ltr %ax
    movzbl tss_descriptor-org+5, %ecx
    check "ltr-busy", %rcx, 0x8b
    fault "ltr-again", GP, TSS, ltr %ax
    movl $DATA, %ecx
    fault "ltr-data", GP, DATA, ltr %cx
    movb $0x09, tss_descriptor-org+5
    fault "ltr-not-present", NP, TSS, ltr %ax
    sgdt FRAMES
    movzwl FRAMES, %eax
    check "sgdt-limit", %rax, (gdt_end - gdt - 1)
    check_address "sgdt-base", FRAMES+2, gdt-org
    sidt FRAMES
    movzwl FRAMES, %eax
    check "sidt-limit", %rax, 0xfff
    check_address "sidt-base", FRAMES+2, idt64-org
    finish

# 32-bit and 16-bit code in long mode.
    case "compatibility"
    movl $far_pointer-org, %ebx
    movl $1f-org, (%rbx)
    movw $CODE32, 4(%rbx)
    movabsq $0x1111111122222222, %rax
    ljmpl *(%rbx)
    .code32
1:  incl %eax                       # one byte: a REX prefix in 64-bit code
    movl %eax, %esi
    movl %esp, %edi
    pushl $0x77
    subl %esp, %edi
    popl %ecx
    pushal
    popal
    # Addresses are 32 bits wide and wrap around.
    movl $0x12345678, FRAMES
    movl $FRAMES + 16, %edx
    movl -16(%edx), %ebp
    movl $0xfffffff0, %edx
    movl FRAMES + 16(%edx), %edx
    ljmp $CODE64, $1f-org
    .code64
1:  check "inc", %rsi, 0x22222223
    check "push-size", %rdi, 4
    check "pop", %rcx, 0x77
    check "memory", %rbp, 0x12345678
    check "wrapped", %rdx, 0x12345678
    user32 "ud2", UD, 0, ud2
    check "user-cs", last_cs-org, USER32
    check "user-rsp", last_rsp-org, USER + STACK_USER
    user32 "hlt", GP, 0, hlt
    user32 "nop", NONE, 0, nop
    user32 "into-clear", NONE, 0, .byte 0xce
    movl $MSR_EFER, %ecx
    user32 "rdmsr", GP, 0, rdmsr
    movl $TEST + 0x10, %ecx
    user32 "page-fault", PF, 4, movl (%ecx), %eax
    check "page-fault-cr2", last_cr2-org, TEST + 0x10
    # BOUND EAX, [EBX].
    movl $10, FRAMES
    movl $20, FRAMES + 4
    movl $21, %eax
    movl $FRAMES + USER, %ebx
    user32 "bound", BR, 0, .byte 0x62, 0x03
    movl $20, %eax
    user32 "bound-inside", NONE, 0, .byte 0x62, 0x03
    user32 "bound-register", UD, 0, .byte 0x62, 0xc0
    # INTO is a trap.
    movq $FLAG_OF | 2, user_flags-org
    enter_user 2f, USER32
    jmp 3f
    .code32
2:  into
4:  nop
    .code64
3:  check_exception "into", OF, 0, (4b-org+USER)
    movq $2, user_flags-org
    # A stack pointer's upper half does not matter, and a return address has 32 bits.
    enter_user 2f, USER32
    jmp 3f
    .code32
2:  call 1f
1:  popl %ebx
    movl $0x13, %eax
    aam
    movl %eax, %ecx
    lcall $USER32, $1f-org+USER
1:  popl %esi
    popl %edi
    ljmp $USER64, $1f-org+USER
    .code64
1:  movabsq $0x1234567887654321, %rdx
    int $BACK
3:  check "aam", last_registers-org+8, 0x109
    check "far-call-cs", last_registers-org+56, USER32
    check "to-64-bit-code", last_registers-org+16, 0x1234567887654321
    # Segment bases count.
    set_entry spare-org, 0x00cff3100000ffff
    movl $SPARE + 3, %eax
    movl $0x99, FRAMES + 0x20
    enter_user 2f, USER32
    jmp 3f
    .code32
2:  movl %eax, %fs
    movl %fs:USER + 0x20, %ecx
    movl %eax, %es
    movl %es:USER + 0x20, %edx
    int $BACK
    .code64
3:  check "fs-base", last_registers-org+8, 0x99
    check "es-base", last_registers-org+16, 0x99
    movl $DATA, %eax
    movl %eax, %es
    # 16-bit code.
    movl %eax, %ds
    movl $2f-org, far_pointer-org
    movw $CODE16, far_pointer-org+4
    movl $0x11112222, %eax
    ljmpl *far_pointer-org
    .code16
2:  incw %ax
    movl $0x33334444, %ecx
    movw $0x1234, %bx
    movb $7, %dl
    movw %bx, %sp
    ljmpl $CODE64, $1f-org
    .code64
1:  check "16-bit-ax", %rax, 0x11112223
    check "16-bit-ecx", %rcx, 0x33334444
    movzwl %sp, %ebx
    check "16-bit-sp", %rbx, 0x1234
    movl $STACK, %esp
    finish
