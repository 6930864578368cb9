; The guest that fits into a boot sector: it counts, and checks its disks against its RAM.
;
; Assemble: nasm -f bin boot.asm -o boot.bin
;
; At start it fills all RAM above 2 MiB with a pattern that is not zero, so that QEMU has to
; save every page. Then, on every tick of a 50 Hz timer (nothing in it needs more, and each costs the host some
; milliseconds), it
;   adds one to a counter in RAM,
;   writes the counter to slot (counter mod 8) of a table in RAM and of a table on every disk,
;   reads the disks' tables back and counts the slots that differ from RAM,
;   prints "c=<counter> bad=<differences so far>" to the first serial port, in hexadecimal.
; RAM and disks that come from two different moments are therefore seen within one tick.
;
; With -DPAGES=n it also writes heavily: each tick, the counter goes to n pages, those of one of 64 blocks above 4 MiB in
; turn. Before that they must hold what the last round has written there; the others count as differences too. Its timer
; has 100 Hz.
;
; Memory: 0x600 counter, 0x604 bad, 0x608 number of disks, 0x610 disk address packet, below 0x7000 the stack (in a page
; without code: TCG takes a write beside code for a write to it, and is slow),
; 0x8000 one sector to write, 0x10000 the 8 sectors read, 0x200000 the table in RAM (a page a slot).
; Disks: the table is in sectors 64 to 71.

        bits 16
        org 0x7c00

COUNTER equ 0x600
BAD     equ 0x604
DISKS   equ 0x608
DAP     equ 0x610
SECTOR  equ 0x8000
TABLE   equ 0x200000
SLOTS   equ 8
LBA     equ 64
PATTERN equ 0x51534e50                  ; "PNSQ"
BLOCKS  equ 64
STAMPS  equ 0x400000
CLOCK   equ 1193182                     ; Hz, of the timer
%ifdef PAGES
RATE    equ 100
%else
RATE    equ 50
%endif

start:  cli
        cld
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
%ifdef PAGES
        mov ax, 0x0201                  ; the second sector, behind this one (the BIOS starts us with es = 0)
        mov bx, 0x7e00
        mov cx, 2
        mov dx, 0x80
        int 0x13
%endif
        mov ax, 0xe000                  ; SeaBIOS's stack lies among its code there, and TCG looks at each write to it for
        mov ds, ax                      ; code that it changes: at much less once what was translated at the start is gone,
        mov es, ax                      ; as it is when the same bytes are written there again
        xor si, si
        xor di, di
        mov cx, 0x10000 / 4
        rep movsd
        mov ds, cx
        mov al, [0x475]                 ; BIOS data area: number of hard disks
        mov [DISKS], al
        in al, 0x92                     ; A20
        or al, 2
        out 0x92, al
        mov ax, 0xe801                  ; ax: KiB from 1 to 16 MiB, bx: 64 KiB blocks above
        int 0x15
        movzx ecx, bx
        shl ecx, 16
        add ecx, 0x1000000 - TABLE
        test bx, bx
        jnz .fill
        movzx ecx, ax
        shl ecx, 10
        sub ecx, TABLE - 0x100000
.fill:  shr ecx, 2
        call flat
        mov edi, TABLE
        mov eax, PATTERN
        a32 rep stosd
        xor eax, eax
        mov [COUNTER], eax
        mov [BAD], eax
        mov al, 0x34                    ; timer 0
        out 0x43, al
        mov ax, CLOCK / RATE
        out 0x40, al
        mov al, ah
        out 0x40, al
        mov cx, SLOTS                   ; both tables start as zeroes
.clear: push cx
        dec cx
        xor eax, eax
        call store
        pop cx
        loop .clear

tick:   sti
        hlt
        inc dword [COUNTER]
%ifdef PAGES
        call stamp
%endif
        mov eax, [COUNTER]
        mov cx, ax
        and cx, SLOTS - 1
        call store
        mov dl, [DISKS]
.disk:  or dl, dl
        jz .print
        dec dl
        mov ax, 0x42 << 8
        mov cx, SLOTS
        xor bx, bx
        mov di, 0x1000
        call disk
        call flat
        mov ax, 0x1000
        mov gs, ax
        mov esi, TABLE
        xor bx, bx
.slot:  mov eax, [es:esi]
        cmp eax, [gs:bx]
        je .same
        inc word [BAD]
.same:  add esi, 4096
        add bx, 512
        cmp bx, SLOTS * 512
        jne .slot
        jmp .disk
.print: mov si, text_c
        mov eax, [COUNTER]
        mov cx, 8
        call print
        mov si, text_bad
        mov eax, [BAD]
        shl eax, 16
        mov cx, 4
        call print
        mov al, 13
        call putc
        mov al, 10
        call putc
        jmp tick

; eax to slot cx, in RAM and on every disk
store:  call flat
        movzx edi, cx
        shl edi, 12
        mov [es:edi + TABLE], eax
        push cx
        push ds
        pop es
        mov di, SECTOR
        mov cx, 128
        rep stosd
        pop bx                          ; slot
        mov dl, [DISKS]
.next:  or dl, dl
        jz .ret
        dec dl
        mov ax, 0x43 << 8
        mov cx, 1
        mov di, SECTOR / 16
        call disk
        jmp .next
.ret:   ret

; BIOS disk function ax on disk dl (0 = first): cx sectors at table slot bx; the buffer is at di:0. Keeps bx, dl.
disk:   mov si, DAP
        mov word [si], 16
        mov [si + 2], cx
        mov word [si + 4], 0
        mov [si + 6], di
        movzx ecx, bx
        add ecx, LBA
        mov [si + 8], ecx
        mov dword [si + 12], 0
        pushad
        or dl, 0x80
        int 0x13
        popad
        ret

; es: base 0, limit 4 GiB ("unreal mode"); the BIOS may have taken it back
flat:   cli
        push eax
        lgdt [gdtr]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov bx, 8
        mov es, bx
        and al, 0xfe
        mov cr0, eax
        xor bx, bx
        mov es, bx
        pop eax
        ret

; text at si (ends with 0), then cx hexadecimal digits of eax, highest first
print:  xchg eax, ebp
.text:  lodsb
        or al, al
        jz .digit
        call putc
        jmp .text
.digit: rol ebp, 4
        mov ax, bp
        and al, 15
        cmp al, 10
        sbb al, 0x69
        das
        call putc
        loop .digit
        ret

putc:   push ax
        mov dx, 0x3fd
.busy:  in al, dx
        test al, 0x20
        jz .busy
        pop ax
        mov dx, 0x3f8
        out dx, al
        ret

text_c: db "c=", 0
text_bad: db " bad=", 0
gdtr:                                   ; in the descriptor that nothing uses
gdt:    dw 15
        dd gdt
        dw 0
        dq 0x00cf92000000ffff

        times 510 - ($ - $$) db 0
        dw 0xaa55

%ifdef PAGES
; the counter to the pages of one block, after a look at what stands there since the last round
stamp:  call flat
        mov eax, [COUNTER]
        mov ebx, eax
        mov edi, eax
        and edi, BLOCKS - 1
        imul edi, PAGES * 4096
        add edi, STAMPS
        sub eax, BLOCKS
        ja .old
        mov eax, PATTERN
.old:   mov cx, PAGES
.page:  cmp [es:edi], eax
        je .good
        inc word [BAD]
.good:  mov [es:edi], ebx
        add edi, 4096
        loop .page
        ret

        times 1024 - ($ - $$) db 0
%endif
