# Real mode. Segments are 0 unless a case says otherwise.

    .code16

    case "real-interrupts", mode=REAL
    movl $1f-org, 4 * 0x60
    movl $0, exceptions-org
    sti
    stc
    int $0x60
    # The handler has changed the flags it returns to.
    pushfw
    popw %ax
    movzwl %ax, %eax
    cli
    cld
    andl $~2, %eax
    check16 "iret-flags", %eax, FLAG_IF | FLAG_DF
    check16 "sp", %esp, STACK_REAL
    jmp 2f
1:  pushfw
    popw %ax
    movzwl %ax, %eax
    andl $~2, %eax
    check16 "handler-flags", %eax, FLAG_CF
    movw %sp, %bp
    movzwl 4(%bp), %eax
    andl $~2, %eax
    check16 "pushed-flags", %eax, FLAG_IF | FLAG_CF
    movzwl 2(%bp), %eax
    check16 "pushed-cs", %eax, 0
    movzwl %bp, %eax
    check16 "handler-sp", %eax, STACK_REAL - 6
    movw $FLAG_IF | FLAG_DF, 4(%bp)
    iretw
2:
    # BOUND AX, [0x600] is 62 06 00 06. Exceptions have no error code here; return address of faults and traps.
    .macro real_exception name, vector, length, insn:vararg
    movw $.Lhandler\@ - org, 4 * \vector
    movw $0, 4 * \vector + 2
    movw $STACK_REAL, %sp
    xorl %eax, %eax
    xorl %ecx, %ecx
.Lat\@:
    \insn
    movl $0xffff, %eax
    jmp .Lshow\@
.Lhandler\@:
    movzwl STACK_REAL - 6, %eax
    subl $.Lat\@ - org, %eax
.Lshow\@:
    movw $STACK_REAL, %sp
    check16 "\name", %eax, \length
    .endm
    real_exception "div-zero", DE, 0, divw %cx
    real_exception "int3", BP, 1, int3
    real_exception "ud2", UD, 0, ud2
    real_exception "int-4", OF, 2, int $4
    xorl %eax, %eax
    movl $0, 0x600
    real_exception "bound-inside", BR, 0xffff, .byte 0x62, 0x06, 0x00, 0x06
    movl $0x00020001, 0x600
    real_exception "bound", BR, 0, .byte 0x62, 0x06, 0x00, 0x06
    movb $0x7f, %al
    real_exception "into-clear", OF, 0xffff, into
    movb $0x7f, %bl
    addb $1, %bl
    movw $1f-org, 4 * OF
    into
    movl $0xffff, %eax
    jmp 2f
1:  movzwl STACK_REAL - 6, %eax
    subl $1b-org, %eax
2:  movw $STACK_REAL, %sp
    addl $8, %eax
    check16 "into", %eax, 0
    # The table may lie elsewhere.
    movl $1f-org, 0x700 + 4 * 0x21
    lidt real_idt-org
    int $0x21
    movl $0, %eax
    jmp 2f
1:  movl $1, %eax
2:  lidt ivt_pointer-org
    check16 "lidt", %eax, 1
    finish
    .balign 8
real_idt:
    .short 0xff
    .quad 0x700

    case "real-segments", mode=REAL
    movw $0x1234, %ax
    movw %ax, %ds
    movw $0x5678, %ax
    movw %ax, %es
    movw $0x2000, %ax
    movw %ax, %fs
    movl $0x11223344, %ds:0x10
    movl %cs:0x1234 << 4 & 0xffff | 0x10, %ebx
    xorw %ax, %ax
    movw %ax, %ds
    movl $0x12340 + 0x10, %esi
    # Addresses above 64 KiB need a segment.
    movw $0x1000, %ax
    movw %ax, %gs
    movl %gs:0x2350, %ecx
    check16 "base", %ecx, 0x11223344
    movl %fs, %eax
    movzwl %ax, %eax
    check16 "selector", %eax, 0x2000
    movl $0x55667788, %fs:0xfffc
    movw $0x2fff, %ax
    movw %ax, %gs
    movl %gs:0xc, %ecx
    check16 "end-of-segment", %ecx, 0x55667788
    # BP means the stack segment.
    movw $0x2000, %ax
    movw %ax, %ss
    movw $0x8000, %sp
    pushw $0x4321
    movw %sp, %bp
    movzwl (%bp), %ecx
    xorw %ax, %ax
    movw %ax, %ss
    movl $STACK_REAL, %esp
    check16 "stack-segment", %ecx, 0x4321
    movw %fs:0x7ffe, %cx
    movzwl %cx, %ecx
    check16 "stack-memory", %ecx, 0x4321
    # SP wraps around.
    movw $0x2000, %ax
    movw %ax, %ss
    movw $0, %sp
    pushw $0x9876
    movzwl %sp, %ebx
    xorw %ax, %ax
    movw %ax, %ss
    movl $STACK_REAL, %esp
    check16 "sp-wrapped", %ebx, 0xfffe
    movzwl %fs:0xfffe, %ecx
    check16 "wrapped-memory", %ecx, 0x9876
    # LDS, LES, LSS.
    movl $0x20000010, 0x600
    lesw 0x600, %bx
    movl %es, %eax
    movzwl %ax, %eax
    check16 "les-selector", %eax, 0x2000
    movzwl %bx, %eax
    check16 "les-offset", %eax, 0x10
    finish

    case "real-calls", mode=REAL
    movl $0xaaaa0000, %esp
    movw $STACK_REAL, %sp
    # A far call to the same code with another segment.
    lcall $0x100, $1f-org-0x1000
.Lbehind_lcall:
    movl %cs, %eax
    movzwl %ax, %eax
    check16 "cs-after", %eax, 0
    movzwl %sp, %eax
    check16 "sp-after", %eax, STACK_REAL + 4
    movw $STACK_REAL, %sp
    jmp 2f
1:  movl %cs, %eax
    movzwl %ax, %eax
    # The recorder is called in this segment as well.
    movl %eax, %esi
    movw %sp, %bp
    movzwl (%bp), %edi
    movzwl 2(%bp), %ebx
    lretw $4
2:  check16 "cs", %esi, 0x100
    check_address16 "pushed-ip", %edi, .Lbehind_lcall-org
    check16 "pushed-cs", %ebx, 0
    movl $1f-org, 0x600
    pushw $0x5555
    callw *0x600
    jmp 2f
1:  retw $2
2:  movzwl %sp, %eax
    check16 "ret-imm", %eax, STACK_REAL
    movl $1f-org, 0x600
    lcallw *0x600
1:  movzwl %sp, %eax
    check16 "indirect-far", %eax, STACK_REAL - 4
    movw $STACK_REAL, %sp
    # PUSH SP pushes the value before.
    pushw %sp
    popw %ax
    movzwl %ax, %eax
    check16 "push-sp", %eax, STACK_REAL
    movw $0x1111, %ax
    movw $0x8888, %di
    pushaw
    movw %sp, 0x600
    movw $0, %di
    popaw
    movzwl 0x600, %eax
    check16 "pusha", %eax, STACK_REAL - 16
    movzwl %di, %eax
    check16 "popa", %eax, 0x8888
    movw $0x7777, %bp
    enter $16, $0
    movzwl %bp, %eax
    movzwl %sp, %ebx
    leave
    check16 "enter-bp", %eax, STACK_REAL - 2
    check16 "enter-sp", %ebx, STACK_REAL - 18
    movzwl %bp, %eax
    check16 "leave", %eax, 0x7777
    # LOOP and JCXZ count CX.
    movl $0x10003, %ecx
    xorl %eax, %eax
1:  incl %eax
    loop 1b
    check16 "loop", %eax, 3
    check16 "loop-ecx", %ecx, 0x10000
    xorl %eax, %eax
    jcxz 1f
    incl %eax
1:  check16 "jcxz", %eax, 0
    finish

    case "real-strings", mode=REAL
    movl $0x04030201, 0x600
    movl $0x08070605, 0x604
    movw $0x600, %si
    movw $0x2000, %ax
    movw %ax, %es
    movw $0xfff8, %di
    movl $0xabcd0004, %ecx
    cld
    rep movsw
    check16 "movs-ecx", %ecx, 0xabcd0000
    movzwl %si, %eax
    check16 "movs-si", %eax, 0x608
    movzwl %di, %eax
    check16 "movs-di", %eax, 0
    movl %es:0xfff8, %eax
    check16 "movs-data", %eax, 0x04030201
    # With a segment prefix, downwards.
    movw $0xfff9, %si
    movw $0x610, %di
    xorw %ax, %ax
    movw %ax, %es
    movw $0x2000, %ax
    movw %ax, %fs
    std
    lodsb %fs:(%si)
    cld
    movzbl %al, %eax
    check16 "lods-fs", %eax, 2
    # SI wraps around: the byte after the last of a segment is its first.
    movb $0x77, %fs:0xffff
    movb $0x78, %fs:0
    movw $0xffff, %si
    lodsb %fs:(%si)
    lodsb %fs:(%si)
    movzbl %al, %eax
    check16 "lods-wrapped", %eax, 0x78
    # The upper half of ESI stays, also with a 32-bit operand.
    movl $0x55550600, %esi
    lodsl
    check16 "lods-esi", %esi, 0x55550604
    check16 "lods-eax", %eax, 0x04030201
    movw $0x600, %di
    movb $4, %al
    movw $20, %cx
    repne scasb
    movzwl %cx, %ecx
    check16 "scas-cx", %ecx, 16
    movw $0x700, %di
    movl $0xfeedface, %eax
    movw $4, %cx
    rep stosl
    movl 0x70c, %eax
    check16 "stos", %eax, 0xfeedface
    # 32-bit addresses.
    movl $0x600, %ebx
    movl $2, %ecx
    movl 4(%ebx), %eax
    check16 "address-32", %eax, 0x08070605
    movzwl 2(%ebx, %ecx, 2), %eax
    check16 "address-scaled", %eax, 0x0807
    movl $0x620, %edi
    movl $3, %ecx
    movb $0x5e, %al
    .byte 0x67
    rep stosb
    check16 "address-32-edi", %edi, 0x623
    check16 "address-32-ecx", %ecx, 0
    # Ports.
    movw $0x60, %dx
    movw $0x630, %di
    movw $2, %cx
    rep insw
    movl 0x630, %eax
    check16 "ins", %eax, 0x61606160
    finish

# To protected mode and back; a segment register keeps its limit, and its base until it is loaded.
    case "real-to-protected", mode=REAL
    lgdtl gdt_pointer-org
    smsw %ax
    andl $0xffff, %eax
    check16 "msw", %eax, 0x10
    movl %cr0, %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    movw $DATA, %bx
    movw %bx, %fs
    andl $~CR0_PE, %eax
    movl %eax, %cr0
    movl $FRAMES, %ebx
    movl $0x13572468, %fs:(%ebx)
    movl %fs:(%ebx), %ecx
    check16 "large-limit", %ecx, 0x13572468
    movl %fs, %eax
    movzwl %ax, %eax
    check16 "selector", %eax, DATA
    # Through 16-bit and 32-bit protected mode.
    movl %cr0, %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    ljmp $CODE16, $1f-org
1:  movw $DATA16, %ax
    movw %ax, %ds
    movw %ax, %ss
    movl %cs, %ecx
    ljmpl $CODE32, $1f-org
    .code32
1:  movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %cs, %edx
    movl $STACK, %esp
    check32 "cs-16", %ecx, CODE16
    check32 "cs-32", %edx, CODE32
    movl FRAMES, %eax
    check32 "data", %eax, 0x13572468
    lidt idt32_pointer-org
    fault32 "ud2", UD, 0, ud2
    movl $0x1238, %eax
    fault32 "load", GP, 0x1238, movl %eax, %gs
    ljmp $CODE16, $1f-org
    .code16
1:  movw $DATA16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %cr0, %eax
    andl $~CR0_PE, %eax
    movl %eax, %cr0
    ljmp $0, $1f-org
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $STACK_REAL, %esp
    lidtl ivt_pointer-org
    movl $1f-org, 4 * 0x60
    movl $0, %eax
    int $0x60
    jmp 2f
1:  movl $1, %eax
    iretw
2:  check16 "real-again", %eax, 1
    finish

# All the way to long mode and back.
    case "real-to-long", mode=REAL
    lgdtl gdt_pointer-org
    lidtl idt64_pointer-org
    movl $PML4, %eax
    movl %eax, %cr3
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    rdmsr
    orl $0x900, %eax
    wrmsr
    rdmsr
    check16 "efer-before", %eax, 0x900
    movl $CR0_PG | CR0_WP | CR0_NE | CR0_PE | 0x10, %eax
    movl %eax, %cr0
    ljmpl $CODE64, $1f-org
    .code64
1:  movl $DATA, %eax
    movl %eax, %ss
    movl $STACK, %esp
    movl $MSR_EFER, %ecx
    rdmsr
    check "efer", %rax, 0xd00
    movabsq $0x123456789abcdef0, %r15
    fault "ud2", UD, 0, ud2
    # Back: to compatibility mode, paging off, long mode off.
    movl $1f-org, far_pointer-org
    movw $CODE16, far_pointer-org+4
    ljmpl *far_pointer-org
    .code16
1:  movw $DATA16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %cr0, %eax
    andl $~CR0_PG, %eax
    movl %eax, %cr0
    movl $MSR_EFER, %ecx
    rdmsr
    movl %eax, %ebx
    andl $~0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~CR0_PE, %eax
    movl %eax, %cr0
    ljmp $0, $1f-org
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movl $STACK_REAL, %esp
    check16 "efer-paging-off", %ebx, 0x900
    movl $MSR_EFER, %ecx
    rdmsr
    check16 "efer-after", %eax, 0x800
    finish
    .code64
