/* Preloaded into QEMU: every fdatasync and fsync takes QSNAP_FLUSH_US microseconds longer, as on an ordinary disk, and
 * is counted in the first 8 bytes of the file QSNAP_FLUSH_COUNT. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t *count;
static struct timespec delay;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("QSNAP_FLUSH_COUNT"), *us = getenv("QSNAP_FLUSH_US");
    int file = path ? open(path, O_RDWR) : -1;
    void *page = file >= 0 ? mmap(0, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    count = page == MAP_FAILED ? 0 : page;
    delay.tv_nsec = us ? atol(us) * 1000 : 0;
}

static int flushed(long number, int file)
{
    if (count)
        __sync_fetch_and_add(count, 1);
    nanosleep(&delay, 0);
    return syscall(number, file);
}

int fdatasync(int file) { return flushed(SYS_fdatasync, file); }
int fsync(int file) { return flushed(SYS_fsync, file); }
