# Self-modifying code. The CPU that runs code it has itself written, at the same linear address,
# must see the new code at the next jump at the latest (SDM volume 3, 8.1.3); all processors since
# the Pentium see it at once, and so must this one.

# The first time that a block is entered the rig's processor does not see its write to itself.
    case "self-modifying-first", where=NOT_KVM
    xorl %eax, %eax
    movb $0x11, 1f-org+1
1:  movb $0, %al
    check "next", %rax, 0x11
    finish

    case "self-modifying"
    # The very next instruction, many times; at first nothing changes.
    xorl %ecx, %ecx
    xorl %edx, %edx
    xorl %eax, %eax
2:  movb %cl, 1f-org+1
1:  movb $0, %al
    addl %eax, %edx
    incl %ecx
    cmpl $100, %ecx
    jbe 2b
    check "next-repeated", %rdx, 5050
    # After a jump; a few instructions ahead; behind, in a loop.
    xorl %eax, %eax
    movb $0x22, 1f-org+1
    jmp 1f
1:  movb $0, %al
    check "jump", %rax, 0x22
    xorl %eax, %eax
    movl $0x33, 1f-org+1
    nop
    nop
    movl %eax, %ebx
1:  movl $0, %eax
    check "ahead", %rax, 0x33
    movl $10, %ecx
    xorl %edx, %edx
1:  addl $0, %edx
    incb 1b-org+2
    decl %ecx
    jnz 1b
    check "loop", %rdx, 45
    # An instruction that changes itself has its old effect once.
    xorl %ecx, %ecx
    movl $2, %ebx
1:  addl $5, %ecx
    movb $7, 1b-org+2
    decl %ebx
    jnz 1b
    check "loop-change", %rcx, 12
    # A repeated string instruction that overwrites what follows it, and itself.
    movl $1f-org, %edi
    movl $4, %ecx
    movb $0x90, %al
    movl $0x5a, %edx
    rep stosb
1:  xorl %edx, %edx
    incl %edx
    check "string-ahead", %rdx, 0x5a
    # Push.
    movl $0x66, %ebx
    movq %rsp, %rsi
    movq 1f-org, %rax
    movb $0x77, %ah
    movl $1f-org + 8, %esp
    pushq %rax
1:  movb $0, %bl
    nop
    nop
    nop
    nop
    nop
    nop
    movq %rsi, %rsp
    check "push", %rbx, 0x77
    # A change of a jump's target, and of one instruction into several.
    xorl %eax, %eax
    movb $2f-1f-2, 1f-org+1
1:  jmp 3f
3:  incl %eax
2:  check "jump-target", %rax, 0
    movl $0x90c0ff90, 1f-org        # nop; inc eax; nop
1:  movw $0x1111, %ax
    check "split", %rax, 1
    finish

# Through another linear address; a serializing instruction comes between.
    case "self-modifying-alias"
    movl $USER, %ebx
    movl $50, %esi
    xorl %edi, %edi
1:  movl %esi, 2f-org+1(%rbx)
    xorl %eax, %eax
    movq %rbx, %r8
    cpuid
    movq %r8, %rbx
2:  movl $0, %eax
    addl %eax, %edi
    decl %esi
    jnz 1b
    check "sum", %rdi, 1275
    finish

    case "self-modifying-pages"
    # A function on another page, written many times.
    movl $200, %ebp
    xorl %esi, %esi
1:  movb $0xb8, FRAMES              # mov eax, ebp; ret
    movl %ebp, FRAMES + 1
    movb $0xc3, FRAMES + 5
    movl $FRAMES, %edx
    call *%rdx
    addl %eax, %esi
    decl %ebp
    jnz 1b
    check "function", %rsi, 20100
    # An instruction over the end of a page: first its second half changes, then its first.
    movb $0xb8, FRAMES + 0xffe
    movl $0x00000011, FRAMES + 0xfff
    movb $0xc3, FRAMES + 0x1003
    movl $FRAMES + 0xffe, %edx
    call *%rdx
    check "crossing", %rax, 0x11
    movl $0, %eax
    movb $0x22, FRAMES + 0x1000
    call *%rdx
    check "crossing-second", %rax, 0x2211
    movb $0x33, FRAMES + 0xfff
    call *%rdx
    check "crossing-first", %rax, 0x2233
    movb $0xb9, FRAMES + 0xffe      # mov ecx
    xorl %ecx, %ecx
    call *%rdx
    check "crossing-opcode", %rcx, 0x2233
    # Code that runs off the end of its page into one that has changed.
    movl $0x90909090, FRAMES + 0x1ffc
    movl $0xc301b0, FRAMES + 0x2000
    movl $FRAMES + 0x1ffc, %edx
    xorl %eax, %eax
    call *%rdx
    check "next-page", %rax, 1
    movb $2, FRAMES + 0x2001
    call *%rdx
    check "next-page-changed", %rax, 2
    # The second page of a crossing instruction is mapped elsewhere.
    map_test 0, FRAME0 | RW
    map_test 1, FRAME1 | RW
    movb $0xb8, FRAME0 + 0xffe
    movb $0x44, FRAME0 + 0xfff
    movl $0xc3000055, FRAME1
    movl $0xc3000066, FRAMES + 0x5000
    movl $PAGE0 + 0xffe, %edx
    call *%rdx
    check "mapped", %rax, 0x5544
    map_test 1, FRAMES + 0x5000 + RW
    call *%rdx
    check "mapped-elsewhere", %rax, 0x6644
    # Data beside code: what is not overwritten goes on.
    movl $FRAMES + 0x3000, %edx
    movl $0x00000183, (%rdx)
    movl $0xc301c083, (%rdx)        # add eax, 1; ret
    movl $1000, %ecx
    xorl %eax, %eax
1:  movl %ecx, 0x40(%rdx)
    call *%rdx
    decl %ecx
    jnz 1b
    check "data-beside", %rax, 1000
    # The same physical code at two linear addresses, relative to its own.
    movl $0x00058d48, FRAMES + 0x4000
    movl $0xc3000000, FRAMES + 0x4004   # lea rax, [rip]; ret
    map_test 0, FRAMES + 0x4000 + RW
    map_test 1, FRAMES + 0x4000 + RW
    movl $PAGE0, %edx
    call *%rdx
    check "address-first", %rax, PAGE0 + 7
    movl $PAGE1, %edx
    call *%rdx
    check "address-second", %rax, PAGE1 + 7
    finish

# The same bytes in code of another size.
    case "code-sizes"
    movl $FRAMES, %edx
    movl $0x90c0ff48, (%rdx)        # 64-bit: inc rax; 32-bit: dec eax, inc eax
    movw $0xcb48, 4(%rdx)           # retfq; 32-bit: dec eax, retf
    movl $0x7fffffff, %eax
    pushq $CODE64
    leaq 1f(%rip), %rcx
    pushq %rcx
    jmp *%rdx
1:  check "64-bit", %rax, 0x80000000
    movl $FRAMES, far_pointer-org
    movw $CODE32, far_pointer-org+4
    movl $0x7fffffff, %eax
    subl $8, %esp
    movl $1f-org, (%rsp)
    movl $CODE64, 4(%rsp)
    ljmpl *far_pointer-org
1:  movl %eax, %eax
    check "32-bit", %rax, 0x7ffffffe
    finish

# Writes by the CPU itself: an exception's frame pushed over code.
    case "frame-over-code"
    movl $FRAMES + 0x100, %edi
    movb $0x90, %al
    movl $0x100, %ecx
    rep stosb
    movb $0xc3, FRAMES + 0x1ff
    movl $FRAMES + 0x1e0, %edx
    call *%rdx
    # The frame of 40 bytes ends at 0x200; SS is its last quadword: 0x10 is ADC, which the
    # next call would meet if it did not find the new bytes.
    movq $FRAMES + 0x200, tss-org + 36
    gate UD, stubs64 + 16 * UD, 0x8e, 1
    fault "frame", UD, 0, ud2
    movl FRAMES + 0x1f8, %eax
    check "pushed", %rax, DATA
    movb $0xb0, FRAMES + 0x1f8
    movb $0x42, FRAMES + 0x1f9
    movb $0xc3, FRAMES + 0x1fa
    movl $FRAMES + 0x1f8, %edx
    xorl %eax, %eax
    call *%rdx
    check "code", %rax, 0x42
    finish
