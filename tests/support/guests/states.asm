; A guest that counts at 0x600, and counts at 0x604 how often the key m was pressed. Other keys make it leave the run
; state "running" by itself: s = ACPI S3, q = power off (S5), p = panic (needs -device pvpanic).
;
; Assemble: nasm -f bin states.asm -o states.bin
;
; PM1a_CNT is where SeaBIOS puts it on q35 and pc: 0x604. SLP_EN is bit 13, SLP_TYP 1 is S3, and 0 is S5.

        bits 16
        org 0x7c00

COUNTER equ 0x600
MARKS   equ 0x604

        cli
        xor ax, ax
        mov ds, ax
        mov dword [COUNTER], 0
        mov dword [MARKS], 0
count:  inc dword [COUNTER]
        in al, 0x64                     ; a key?
        test al, 1
        jz count
        in al, 0x60
        cmp al, 0x32
        je mark
        cmp al, 0x1f
        je sleep
        cmp al, 0x10
        je off
        cmp al, 0x19
        jne count
        mov dx, 0x505                   ; pvpanic: PVPANIC_PANICKED
        mov al, 1
        out dx, al
        jmp count
mark:   inc dword [MARKS]
        jmp count
sleep:  mov ax, 0x2400
        jmp power
off:    mov ax, 0x2000
power:  mov dx, 0x604
        out dx, ax
        jmp count

        times 510 - ($ - $$) db 0
        dw 0xaa55
