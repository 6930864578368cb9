; The guest that changes its own code: what it runs after a load must be the code that RAM holds.
;
; Assemble: nasm -f bin selfmod.asm -o selfmod.bin
;
; It executes one `mov al, LETTER` over and over, and prints al to the first serial port on every tick of the BIOS clock
; (18.2 Hz). For each key that is pressed it stores the next letter into that instruction. An emulator that goes on with
; code it translated before a load prints the letter of then, though the byte in RAM is the one that was loaded.
;
; With the letter PANICKED it also tells QEMU, each time, that its kernel has panicked (by the pvpanic device, if it has
; that): so it stops at once whenever it runs.

        bits 16
        org 0x7c00

TICKS   equ 0x46c                       ; BIOS data area: ticks since midnight
HEAD    equ 0x41a                       ; ... and where keys are taken from the keyboard's buffer, and put into it
TAIL    equ 0x41c
PVPANIC equ 0x505                       ; QEMU's docs/specs/pvpanic.rst; bit 0: panicked
PANICKED equ 'e'

        jmp short start
code:   mov al, 'a'                     ; the letter is at 0x7c03
        ret
start:  xor ax, ax
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov sp, 0x7c00
        sti
again:  call code
        cmp al, PANICKED
        jne .lives
        mov dx, PVPANIC
        mov al, 1
        out dx, al
        mov al, PANICKED
.lives:
        mov bx, [TAIL]
        cmp bx, [HEAD]
        je .idle
        mov [HEAD], bx
        inc byte [code + 1]
.idle:  cmp ecx, [TICKS]
        je again
        mov ecx, [TICKS]
        mov dx, 0x3f8
        out dx, al
        jmp again

        times 510 - ($ - $$) db 0
        dw 0xaa55
