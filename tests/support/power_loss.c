/* Stands between a Redis and libc (LD_PRELOAD) and notes what a power loss would leave of its files; see power_loss.py.
 *
 * MIXTRAL_SYNC_LOG names the notes, one line each, appended with one write:
 *   S <inode> <bytes>     the file was synced; so many bytes stood in it when the sync began
 *   D <inode>             the folder was synced
 *   R <folder's inode> <old name>\t<new name>\t<where the former file of that name is kept, or ->
 * MIXTRAL_SYNC_DELAY names a file with milliseconds that every sync of a file takes longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void note(const char *line) {
    const char *path = getenv("MIXTRAL_SYNC_LOG");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd < 0 || write(fd, line, strlen(line)) < 0) abort();
    close(fd);
}

static void be_slow(void) {
    const char *path = getenv("MIXTRAL_SYNC_DELAY");
    FILE *file = path ? fopen(path, "re") : NULL;
    int ms = 0;
    if (!file) return;
    if (fscanf(file, "%d", &ms) == 1 && ms > 0) usleep(ms * 1000);
    fclose(file);
}

static int sync_and_note(int fd, const char *name) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    char line[128];
    struct stat facts;
    if (fstat(fd, &facts)) return real(fd);
    if (S_ISREG(facts.st_mode)) be_slow();
    if (real(fd)) return -1;
    if (S_ISDIR(facts.st_mode)) snprintf(line, sizeof line, "D %lu\n", facts.st_ino);
    else snprintf(line, sizeof line, "S %lu %ld\n", facts.st_ino, (long)facts.st_size);
    note(line);
    return 0;
}

int fsync(int fd) { return sync_and_note(fd, "fsync"); }
int fdatasync(int fd) { return sync_and_note(fd, "fdatasync"); }

int rename(const char *old, const char *new) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    static int number = 0;
    char from[PATH_MAX], to[PATH_MAX], kept[PATH_MAX + 64], folder[PATH_MAX], line[3 * PATH_MAX + 256];
    struct stat facts;
    if (!realpath(old, from)) return real(old, new);
    snprintf(folder, sizeof folder, "%s", new);
    if (!realpath(dirname(folder), to) || stat(to, &facts)) return real(old, new);
    snprintf(folder, sizeof folder, "%s", new);
    strncat(strncat(to, "/", sizeof to - strlen(to) - 1), basename(folder), sizeof to - strlen(to) - 1);
    snprintf(kept, sizeof kept, "%s.former-%d-%d", to, (int)getpid(), number++);
    if (link(to, kept)) strcpy(kept, "-");
    if (real(old, new)) return -1;
    snprintf(line, sizeof line, "R %lu %s\t%s\t%s\n", facts.st_ino, from, to, kept);
    note(line);
    return 0;
}
