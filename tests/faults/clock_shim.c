/*
 * Preloaded into one process, it gives that process another time of day: what the machine says, times a pace, plus an
 * offset. Both stand in the file that CLOCK_SHIM names (two doubles: offset in seconds, pace), mapped, so that the
 * harness changes them while the process runs. Monotonic clocks and sleeps stay as they are, which is why this is not
 * libfaketime: that one (0.9.10) makes clock_nanosleep with an absolute monotonic time return EINVAL.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile double *setting;
static double begun;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void prepare(void)
{
    const char *path = getenv("CLOCK_SHIM");
    struct timespec now;
    int file;

    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (path == NULL || real_gettime == NULL || (file = open(path, O_RDONLY | O_CLOEXEC)) < 0)
        _exit(97); /* a process that should have another clock and has the machine's would show nothing */
    void *mapped = mmap(NULL, 2 * sizeof(double), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped == MAP_FAILED)
        _exit(97);
    setting = mapped;
    real_gettime(CLOCK_REALTIME, &now);
    begun = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int clock_gettime(clockid_t id, struct timespec *at)
{
    int done;

    if (real_gettime == NULL)
        prepare();
    done = real_gettime(id, at);
    if (done == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        double since = (double)at->tv_sec + (double)at->tv_nsec / 1e9 - begun;
        double told = begun + since * setting[1] + setting[0];
        at->tv_sec = (time_t)told;
        at->tv_nsec = (long)((told - (double)at->tv_sec) * 1e9);
    }
    return done;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    struct timespec now;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if (at != NULL)
        *at = now.tv_sec;
    return now.tv_sec;
}
