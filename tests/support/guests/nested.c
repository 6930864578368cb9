/* Process 1 of a Linux guest that works in the host's file system: what it writes there stays in the guest's memory.
 *
 * Build: gcc -O2 -static -o init nested.c
 *
 * It runs what stands behind "run=" on the kernel's command line in a shell, prints "exit=<code>", and turns itself off.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static const char *const modules[] = {"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
                                      "virtio_pci", "netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "overlay"};

static void off(const char *what, int code)
{
    if (what)
        perror(what);
    printf("\nexit=%d\n", code);
    fflush(stdout);
    tcdrain(1);
    reboot(RB_POWER_OFF);
}

static void in(const char *what, const char *type, const char *place, unsigned long flags, const char *options)
{
    if (mount(what, place, type, flags, options))
        off(place, 125);
}

int main(void)
{
    static char path[64], cmdline[4096];

    mount("none", "/dev", "devtmpfs", 0, 0);
    int file = open("/dev/console", O_RDWR), status = 0;
    dup2(file, 0), dup2(file, 1), dup2(file, 2);
    for (unsigned i = 0; i < sizeof modules / sizeof *modules; i++) {
        snprintf(path, sizeof path, "/%s.ko", modules[i]);
        file = open(path, O_RDONLY);  /* a kernel may have it built in */
        syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
    in("host", "9p", "/host", MS_RDONLY, "trans=virtio,version=9p2000.L,cache=loose,msize=512000");
    in("none", "tmpfs", "/over", 0, "size=90%");
    mkdir("/over/up", 0755), mkdir("/over/work", 0755);
    in("none", "overlay", "/root", 0, "lowerdir=/host,upperdir=/over/up,workdir=/over/work");
    in("none", "proc", "/root/proc", 0, 0);
    in("none", "sysfs", "/root/sys", 0, 0);
    in("none", "devtmpfs", "/root/dev", 0, 0);
    mkdir("/root/dev/shm", 01777);
    in("none", "tmpfs", "/root/dev/shm", 0, 0);
    in("none", "tmpfs", "/root/run", 0, 0);
    if (chroot("/root") || chdir("/"))
        off("/root", 125);
    file = open("/proc/cmdline", O_RDONLY);
    if (read(file, cmdline, sizeof cmdline - 1) < 0)
        off("/proc/cmdline", 125);
    const char *command = strstr(cmdline, "run=");
    pid_t child = fork();
    if (!child) {
        setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
        setsid();
        execl("/bin/sh", "sh", "-c", command ? command + 4 : "exit 127", (char *)0);
        _exit(127);
    }
    while (wait(&status) != child)
        ;
    off(0, WIFEXITED(status) ? WEXITSTATUS(status) : 126);
}
