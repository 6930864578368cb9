// A guest for the aarch64 machine "virt" that counts, and changes its own code. Its code is in the first flash chip.
//
// COUNT goes up in a loop. In each turn it calls CODE, a `movz w5, #N` in RAM, and compares what that gives with what RAM
// holds there; BAD counts where these differ. Every 4096 counts it stores another N. An emulator that goes on with code
// that it translated before a load gives the N of then.
//
// Assemble: aarch64-linux-gnu-as aarch64.s -o a.o && aarch64-linux-gnu-objcopy -O binary a.o aarch64.bin

        .equ    COUNT, 0                // at 0x40200000
        .equ    BAD, 4
        .equ    CODE, 0x1000

_start: ldr     x10, =0x40200000
        add     x11, x10, #CODE
        ldr     w12, =0x52800005        // movz w5, #0
        str     w12, [x11]
        ldr     w0, =0xd65f03c0         // ret
        str     w0, [x11, #4]
        str     xzr, [x10, #COUNT]
        bl      changed
loop:   ldr     w2, [x10, #COUNT]
        add     w2, w2, #1
        str     w2, [x10, #COUNT]
        blr     x11
        ldr     w0, [x11]
        ubfx    w0, w0, #5, #16
        cmp     w0, w5
        b.eq    same
        ldr     w3, [x10, #BAD]
        add     w3, w3, #1
        str     w3, [x10, #BAD]
same:   tst     w2, #0xfff
        b.ne    loop
        ubfx    w0, w2, #12, #16
        orr     w0, w12, w0, lsl #5
        str     w0, [x11]
        bl      changed
        b       loop

changed:                                // what RAM holds is what runs
        dc      cvau, x11
        dsb     ish
        ic      ivau, x11
        dsb     ish
        isb
        ret
