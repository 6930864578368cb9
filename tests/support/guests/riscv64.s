# A guest for the riscv64 machine "virt" that counts, and changes its own code. Its code is in the first flash chip.
#
# COUNT goes up in a loop. In each turn it calls CODE, a `lui a0, N` in RAM, and compares what that gives with what RAM
# holds there; BAD counts where these differ. Every 4096 counts it stores another N. An emulator that goes on with code
# that it translated before a load gives the N of then.
#
# Assemble: riscv64-linux-gnu-as riscv64.s -o r.o && riscv64-linux-gnu-objcopy -O binary r.o riscv64.bin

        .option norvc
        .equ    COUNT, 0                # at 0x80200000
        .equ    BAD, 4

_start: li      t0, 0x80200000
        li      t1, 0x80201000          # CODE
        li      a2, 0x537               # lui a0, 0
        sw      a2, 0(t1)
        li      a2, 0x8067              # ret
        sw      a2, 4(t1)
        sd      zero, COUNT(t0)
        fence.i
loop:   lw      a1, COUNT(t0)
        addiw   a1, a1, 1
        sw      a1, COUNT(t0)
        jalr    ra, 0(t1)
        lw      a2, 0(t1)
        srliw   a2, a2, 12
        srliw   a3, a0, 12
        beq     a2, a3, same
        lw      a4, BAD(t0)
        addiw   a4, a4, 1
        sw      a4, BAD(t0)
same:   slli    a5, a1, 52              # the lower 12 bits
        bnez    a5, loop
        ori     a2, a1, 0x537           # lui a0, COUNT / 4096
        sw      a2, 0(t1)
        fence.i
        j       loop
