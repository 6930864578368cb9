/* A Linux guest that checks itself, as the boot-sector guest does: process 1 of a kernel with no other.
 *
 * Build: gcc -O2 -static -o init init.c
 *
 * On every tick of 10 ms it adds one to a counter, and
 *   - writes it to one of 64 blocks of pages of a buffer in turn, after a look at what stands there since the last
 *     round: stamps=N pages a block,
 *   - writes it to slot (counter mod 32) of a table in RAM and of one on every disk, past the page cache, reads the
 *     disks' tables back and counts the slots that differ from RAM,
 *   - prints "c=<counter> bad=<differences so far>".
 * The rest of its buffer of fill=N MiB is filled once with what is not zero, and a page of it is checked on each tick.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCKS = 64, SLOTS = 32, PAGE = 4096, SECTOR = 512, TABLE = 64 * SECTOR, PATTERN = 0x51534e50 };

static const char *const modules[] = {"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
                                      "virtio_pci", "virtio_blk"};

static long option(const char *text, const char *name, long otherwise)
{
    const char *found = strstr(text, name);
    return found ? atol(found + strlen(name)) : otherwise;
}

int main(void)
{
    static char cmdline[4096], path[64];
    static uint8_t table[SLOTS * SECTOR] __attribute__((aligned(PAGE)));
    static uint8_t read_back[SLOTS * SECTOR] __attribute__((aligned(PAGE)));
    int disks[2], count = 0;
    uint32_t counter = 0, bad = 0;

    mount("none", "/dev", "devtmpfs", 0, 0);
    mount("none", "/proc", "proc", 0, 0);
    int file = open("/dev/console", O_RDWR);
    dup2(file, 0), dup2(file, 1), dup2(file, 2);
    file = open("/proc/cmdline", O_RDONLY);
    if (read(file, cmdline, sizeof cmdline - 1) < 0)
        return 1;
    for (unsigned i = 0; i < sizeof modules / sizeof *modules; i++) {
        snprintf(path, sizeof path, "/%s.ko", modules[i]);
        file = open(path, O_RDONLY);
        syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
    for (char name = 'a'; name <= 'b'; name++) {
        snprintf(path, sizeof path, "/dev/vd%c", name);
        for (int wait = 0; wait < 100 && (file = open(path, O_RDWR | O_DIRECT | O_SYNC)) < 0; wait++)
            usleep(10000);
        if (file >= 0)
            disks[count++] = file;
    }
    long stamps = option(cmdline, "stamps=", 256), fill = option(cmdline, "fill=", 64);
    size_t pages = (size_t)fill << 8;
    if (pages < BLOCKS * stamps)
        pages = BLOCKS * stamps;
    uint8_t *buffer = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    for (size_t i = 0; i < pages * PAGE / 4; i++)
        ((uint32_t *)buffer)[i] = PATTERN;
    for (int d = 0; d < count; d++)
        if (pwrite(disks[d], table, sizeof table, TABLE) < 0)
            return 1;
    printf("ready: %d disks, %ld MiB\r\n", count, (long)(pages >> 8));
    fflush(stdout);
    for (;;) {
        struct timespec tick = {0, 10000000};
        nanosleep(&tick, 0);
        counter++;
        uint32_t before = counter > BLOCKS ? counter - BLOCKS : PATTERN;
        uint8_t *block = buffer + (size_t)(counter % BLOCKS) * stamps * PAGE;
        for (long p = 0; p < stamps; p++) {
            bad += *(uint32_t *)(block + p * PAGE) != before;
            *(uint32_t *)(block + p * PAGE) = counter;
        }
        if (pages > BLOCKS * stamps) {
            size_t page = BLOCKS * stamps + (size_t)counter * 7919 % (pages - BLOCKS * stamps);
            bad += *(uint32_t *)(buffer + page * PAGE) != PATTERN;
        }
        int slot = counter % SLOTS;
        for (int i = 0; i < SECTOR / 4; i++)
            ((uint32_t *)(table + slot * SECTOR))[i] = counter;
        for (int d = 0; d < count; d++) {
            if (pwrite(disks[d], table + slot * SECTOR, SECTOR, TABLE + slot * SECTOR) != SECTOR ||
                pread(disks[d], read_back, sizeof read_back, TABLE) != sizeof read_back)
                bad++;
            for (int i = 0; i < SLOTS; i++)
                bad += memcmp(table + i * SECTOR, read_back + i * SECTOR, 4) != 0;
        }
        printf("c=%08X bad=%04X\r\n", counter, bad & 0xffff);
        fflush(stdout);
    }
}
