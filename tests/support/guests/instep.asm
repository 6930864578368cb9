; A guest that counts in step with another one, over the second serial port.
;
; Assemble: nasm -f bin instep.asm -o instep.bin
;
; COUNT is its own count, SEEN the last count that it has received of the other one. It goes on to the next count when
; the other one has acknowledged the present one: by sending as much, or more. It sends its count then, and on every
; tick of the BIOS clock (18.2 Hz), because messages may get lost. So neither is ever more than one ahead, and SEEN is
; never more than the other's COUNT.
;
; A message has three bytes of seven bits of the count, the lowest first; only the first one has bit 7 set.

        bits 16
        org 0x7c00

COUNT   equ 0x600
SEEN    equ 0x604
PARTIAL equ 0x608                       ; what has come of a message
SHIFT   equ 0x60c                       ; ... and where its next bits go; 21: none is expected
TICKS   equ 0x46c                       ; BIOS data area
PORT    equ 0x2f8                       ; COM2

        cli
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7c00
        mov dword [COUNT], 1
        mov dword [SEEN], 0
        mov byte [SHIFT], 21
        mov word [0x0b * 4], received
        mov word [0x0b * 4 + 2], 0
        mov dx, PORT + 3                ; 8n1
        mov al, 3
        out dx, al
        mov dx, PORT + 2                ; FIFOs, empty
        mov al, 7
        out dx, al
        mov dx, PORT + 4                ; DTR, RTS, OUT2: interrupts reach the PIC
        mov al, 0x0b
        out dx, al
        mov dx, PORT + 1                ; interrupt on receipt
        mov al, 1
        out dx, al
        mov al, 0xf6                    ; only the timer and COM2 interrupt
        out 0x21, al

again:  cli
        mov dx, PORT + 5
        in al, dx
        test al, 1
        jnz byte_in
        mov ecx, [TICKS]
        cmp ecx, ebp
        jne tick
        sti
        hlt
        jmp again
tick:   mov ebp, ecx
        sti
        call send
        jmp again

byte_in:
        sti
        mov dx, PORT
        in al, dx
        movzx eax, al
        mov cl, [SHIFT]
        test al, 0x80
        jz .more
        xor cl, cl
        mov dword [PARTIAL], 0
        and al, 0x7f
.more:  cmp cl, 21
        jae again                       ; its beginning is lost
        shl eax, cl
        or [PARTIAL], eax
        add cl, 7
        mov [SHIFT], cl
        cmp cl, 21
        jb again
        mov eax, [PARTIAL]
        mov [SEEN], eax
        cmp eax, [COUNT]
        jb again
        inc dword [COUNT]
        call send
        jmp again

send:   mov ebx, [COUNT]
        mov ah, 0x80
        mov cx, 3
.next:  mov dx, PORT + 5
.wait:  in al, dx
        test al, 0x20                   ; room for a byte
        jz .wait
        mov al, bl
        and al, 0x7f
        or al, ah
        mov dx, PORT
        out dx, al
        xor ah, ah
        shr ebx, 7
        loop .next
        ret

received:
        push ax
        mov al, 0x20
        out 0x20, al
        pop ax
        iret

        times 510 - ($ - $$) db 0
        dw 0xaa55
