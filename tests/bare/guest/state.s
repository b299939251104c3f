# CPUID, model-specific registers, time, and the state of x87, SSE and AVX.

    case "cpuid"
    movl $1, %eax
    cpuid
    movl %ecx, %esi
    movl %edx, %edi
    shrl $24, %ebx
    check "apic-id", %rbx, 0
    shrl $31, %esi
    check "hypervisor", %rsi, 1
    # FPU, PSE, TSC, MSR, PAE, CX8, APIC, PGE, CMOV, FXSR, SSE, SSE2.
    andl $0x0700a379, %edi
    check "baseline", %rdi, 0x0700a379
    movl $0x80000001, %eax
    cpuid
    andl $0x20100800, %edx
    check "long-mode", %rdx, 0x20100800
    # The upper halves are cleared.
    movq $-1, %rax
    movq $-1, %rbx
    movq $-1, %rcx
    movq $-1, %rdx
    movl $0, %eax
    cpuid
    movq %rax, %rsi
    orq %rbx, %rsi
    orq %rcx, %rsi
    orq %rdx, %rsi
    shrq $32, %rsi
    check "upper-halves", %rsi, 0
    # KVM's leaves.
    movl $0x40000000, %eax
    cpuid
    check "signature-b", %rbx, 0x4b4d564b
    check "signature-c", %rcx, 0x564b4d56
    check "signature-d", %rdx, 0x4d
    finish

    case "model-specific"
    .macro keep name, msr, value
    write_msr \msr, \value
    xorl %eax, %eax
    xorl %edx, %edx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    check "\name", %rax, \value
    .endm
    keep "star", MSR_STAR, 0x0033000812345678
    keep "lstar", MSR_LSTAR, 0xffffffff81234567
    keep "cstar", MSR_CSTAR, 0x00007f8112345678
    keep "sfmask", MSR_SFMASK, 0x47700
    keep "fs-base", MSR_FS_BASE, 0x00007fff12345678
    keep "gs-base", MSR_GS_BASE, 0xffff888012345678
    keep "kernel-gs-base", MSR_KERNEL_GS_BASE, 0xffff888087654321
    keep "sysenter-cs", MSR_SYSENTER_CS, 8
    keep "sysenter-esp", MSR_SYSENTER_ESP, 0x12345678
    keep "sysenter-eip", MSR_SYSENTER_EIP, 0x87654321
    keep "pat", 0x277, 0x0007040600070406
    movl $0x277, %ecx
    movl $0x02, %eax                # type 2 is reserved
    xorl %edx, %edx
    fault "pat-reserved", GP, 0, wrmsr
    # The upper halves of RAX and RDX are cleared.
    movq $-1, %rax
    movq $-1, %rdx
    movl $MSR_SYSENTER_CS, %ecx
    rdmsr
    check "upper-rax", %rax, 8
    check "upper-rdx", %rdx, 0
    # The upper half of RCX does not matter.
    movabsq $0x1234567800000174, %rcx
    rdmsr
    check "upper-rcx", %rax, 8
    finish

    case "time"
    movq $-1, %rax
    movq $-1, %rdx
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, %rbx
    wait_cycles 1000
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    cmpq %rbx, %rax
    seta %al
    movzbl %al, %eax
    check "forward", %rax, 1
    finish

    case "rdtscp"
    need 0x80000001, 0, %edx, 27
    write_msr MSR_TSC_AUX, 0x12345
    movq $-1, %rcx
    rdtscp
    check "aux", %rcx, 0x12345
    user "cpl-3", NONE, 0, rdtscp
    set_bits %cr4, 4
    user "cpl-3-tsd", GP, 0, rdtscp
    finish

    case "fxsave"
    fninit
    fldpi
    fld1
    movabsq $0x1122334455667788, %rax
    movq %rax, %xmm0
    movabsq $0x99aabbccddeeff00, %rax
    movq %rax, %xmm15
    movl $0x1fa0, FRAMES + 0x400
    ldmxcsr FRAMES + 0x400
    movq $-1, FRAMES + 0x1f8
    fxsave64 FRAMES
    movzwl FRAMES, %eax
    check "control", %rax, 0x37f
    movzwl FRAMES + 2, %eax
    andl $0x3800, %eax
    check "status-top", %rax, 6 << 11
    movzbl FRAMES + 4, %eax
    check "tags", %rax, 0xc0
    movl FRAMES + 24, %eax
    check "mxcsr", %rax, 0x1fa0
    movq FRAMES + 32, %rax
    check "st0", %rax, 0x8000000000000000
    movzwl FRAMES + 40, %eax
    check "st0-exponent", %rax, 0x3fff
    movq FRAMES + 48, %rax
    check "st1", %rax, 0xc90fdaa22168c235
    movq FRAMES + 160, %rax
    check "xmm0", %rax, 0x1122334455667788
    movq FRAMES + 160 + 240, %rax
    check "xmm15", %rax, 0x99aabbccddeeff00
    movq FRAMES + 0x1f8, %rax
    check "untouched", %rax, 0xffffffffffffffff
    fninit
    fldz
    pxor %xmm0, %xmm0
    pxor %xmm15, %xmm15
    fxrstor64 FRAMES
    movq %xmm0, %rax
    check "xmm0-restored", %rax, 0x1122334455667788
    movq %xmm15, %rax
    check "xmm15-restored", %rax, 0x99aabbccddeeff00
    fstpl FRAMES + 0x800
    movq FRAMES + 0x800, %rax
    check "st0-restored", %rax, 0x3ff0000000000000
    fstpl FRAMES + 0x800
    movq FRAMES + 0x800, %rax
    check "st1-restored", %rax, 0x400921fb54442d18
    fnstsw %ax
    movzwl %ax, %eax
    andl $0x3800, %eax
    check "top-restored", %rax, 0
    movl $0, FRAMES + 0x400
    stmxcsr FRAMES + 0x400
    movl FRAMES + 0x400, %eax
    check "mxcsr-restored", %rax, 0x1fa0
    # FNSAVE and FRSTOR.
    fninit
    fld1
    fnsave FRAMES + 0x600
    fnstsw %ax
    movzwl %ax, %eax
    check "fnsave-initializes", %rax, 0
    frstor FRAMES + 0x600
    fstps FRAMES + 0x800
    movl FRAMES + 0x800, %eax
    check "frstor", %rax, 0x3f800000
    finish

# The rig's processor does not tell KVM about XSETBV, so XCR0 is lost at the next exit.
    case "xsave", where=NOT_KVM
    need 1, 0, %ecx, 26
    fault "not-enabled", UD, 0, xsave FRAMES
    xorl %ecx, %ecx
    fault "xgetbv-not-enabled", UD, 0, xgetbv
    set_bits %cr4, CR4_OSXSAVE
    movl $1, %eax
    cpuid
    shrl $27, %ecx
    andl $1, %ecx
    check "cpuid-osxsave", %rcx, 1
    xorl %ecx, %ecx
    movl $3, %eax
    xorl %edx, %edx
    xsetbv
    xgetbv
    check "xcr0", %rax, 3
    check "xcr0-high", %rdx, 0
    movl $2, %eax
    fault "without-x87", GP, 0, xsetbv
    movl $5, %eax
    fault "avx-without-sse", GP, 0, xsetbv
    movl $3, %eax
    movl $0x40000000, %edx
    fault "reserved", GP, 0, xsetbv
    xorl %edx, %edx
    movl $1, %ecx
    fault "xcr1", GP, 0, xsetbv
    xorl %ecx, %ecx
    user "xsetbv-cpl-3", GP, 0, xsetbv
    user "xgetbv-cpl-3", NONE, 0, xgetbv
    # Area: FRAMES, header at 512.
    fninit
    fldpi
    movabsq $0x1122334455667788, %rax
    movq %rax, %xmm3
    movl $3, %eax
    xorl %edx, %edx
    xsave64 FRAMES
    movq FRAMES + 512, %rax
    andl $3, %eax
    check "header", %rax, 3
    movq FRAMES + 160 + 48, %rax
    check "xmm3", %rax, 0x1122334455667788
    pxor %xmm3, %xmm3
    fninit
    movl $2, %eax
    xrstor64 FRAMES
    movq %xmm3, %rax
    check "xmm3-restored", %rax, 0x1122334455667788
    fnstsw %ax
    movzwl %ax, %eax
    check "x87-not-restored", %rax, 0
    movl $3, %eax
    xrstor64 FRAMES
    fstpl FRAMES + 0x800
    movq FRAMES + 0x800, %rax
    check "x87-restored", %rax, 0x400921fb54442d18
    # A part whose header bit is clear goes to its initial state; MXCSR comes along.
    movq $1, FRAMES + 512
    movl $3, %eax
    xrstor64 FRAMES
    movq %xmm3, %rax
    check "xmm3-initial", %rax, 0
    # Only what is asked for is written.
    movabsq $0x5566778899aabbcc, %rax
    movq %rax, %xmm3
    movl $1, %eax
    xsave64 FRAMES
    movq FRAMES + 160 + 48, %rax
    check "xmm3-not-saved", %rax, 0x1122334455667788
    fault "unaligned", GP, 0, xsave FRAMES + 16
    movl $3, %eax
    movl $1 << 8, FRAMES + 516
    fault "header-reserved", GP, 0, xrstor FRAMES
    movq $3, FRAMES + 512
    movq $1, FRAMES + 528
    fault "header-zeroes", GP, 0, xrstor FRAMES
    movq $0, FRAMES + 528
    set_bits %cr0, CR0_TS
    fault "ts", NM, 0, xsave FRAMES
    clts
    finish

    case "avx", where=NOT_KVM
    need 1, 0, %ecx, 28
    fault "not-enabled", UD, 0, vaddps %xmm0, %xmm0, %xmm0
    set_bits %cr4, CR4_OSXSAVE
    xorl %ecx, %ecx
    movl $3, %eax
    xorl %edx, %edx
    xsetbv
    fault "not-in-xcr0", UD, 0, vaddps %xmm0, %xmm0, %xmm0
    movl $7, %eax
    xsetbv
    fault "enabled", NONE, 0, vaddps %xmm0, %xmm0, %xmm0
    movl $0xd, %eax
    xorl %ecx, %ecx
    cpuid
    check "area", %rbx, 832
    # The upper half of YMM2 is at 576 + 32.
    movl $0x3f800000, %eax
    movd %eax, %xmm2
    vinsertf128 $1, %xmm2, %ymm2, %ymm2
    movl $7, %eax
    xorl %edx, %edx
    xsave64 FRAMES
    movl FRAMES + 576 + 32, %eax
    check "upper", %rax, 0x3f800000
    vzeroall
    movl $7, %eax
    xrstor64 FRAMES
    vextractf128 $1, %ymm2, %xmm4
    movd %xmm4, %eax
    check "upper-restored", %rax, 0x3f800000
    # SSE keeps the upper half, AVX clears it.
    movaps %xmm0, %xmm2
    vextractf128 $1, %ymm2, %xmm4
    movd %xmm4, %eax
    check "sse-keeps-upper", %rax, 0x3f800000
    vmovaps %xmm0, %xmm2
    vextractf128 $1, %ymm2, %xmm4
    movd %xmm4, %eax
    check "avx-clears-upper", %rax, 0
    set_bits %cr0, CR0_TS
    fault "ts", NM, 0, vaddps %ymm0, %ymm0, %ymm0
    clts
    # A 32-byte access over the end of a page.
    map_test 0, FRAME0 | RW
    movl $PAGE1 - 16, %ebx
    fault "page-crossing", PF, 2, vmovups %ymm0, (%rbx)
    check "page-crossing-cr2", last_cr2-org, PAGE1
    finish
