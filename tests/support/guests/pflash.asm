; A guest that writes to its variable store: on every timer tick it adds one to a counter at 0x600 and
; programs the byte at that offset of the second flash chip to 0xaa.
;
; Assemble: nasm -f bin pflash.asm -o pflash.bin
;
; The chip is QEMU's cfi.pflash01 of 256 KiB, below a firmware of 256 KiB: at 4 GiB - 512 KiB.

        bits 16
        org 0x7c00

COUNTER equ 0x600
FLASH   equ 0xfff80000

        cli
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7c00
        mov dword [COUNTER], 0
        lgdt [gdtr]
        mov eax, cr0                    ; es: base 0, limit 4 GiB
        or al, 1
        mov cr0, eax
        mov bx, 8
        mov es, bx
        and al, 0xfe
        mov cr0, eax
        xor bx, bx
        mov es, bx
        mov al, 0x34                    ; timer 0: 100 Hz
        out 0x43, al
        mov ax, 11932
        out 0x40, al
        mov al, ah
        out 0x40, al
        mov al, 0xfe                    ; only the timer interrupts, and it does nothing:
        out 0x21, al                    ; the BIOS must not touch es
        mov word [8 * 4], ticked
        mov word [8 * 4 + 2], 0
tick:   sti
        hlt
        cli
        inc dword [COUNTER]
        mov edi, [COUNTER]
        add edi, FLASH
        mov byte [es:edi], 0x40         ; CFI: program a byte,
        mov byte [es:edi], 0xaa         ; this one,
        mov byte [es:edi], 0xff         ; and back to reading
        jmp tick

ticked: push ax
        mov al, 0x20
        out 0x20, al
        pop ax
        iret

        align 8, db 0
gdt:    dq 0, 0x00cf92000000ffff
gdtr:   dw 15
        dd gdt

        times 510 - ($ - $$) db 0
        dw 0xaa55
