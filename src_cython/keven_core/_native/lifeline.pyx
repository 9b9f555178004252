"""Ends this process when the one that holds the other end of a pipe is gone, whatever state Python is in.

A thread that never takes the GIL waits for the end of the pipe: a handler that hangs, or computes in C for ever, does
not keep an orphan alive.
"""

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <time.h>
    #include <unistd.h>

    typedef struct { int fd; int grace_ms; } keven_lifeline;

    static void *keven_hold_lifeline(void *arg) {
        keven_lifeline line = *(keven_lifeline *)arg;
        struct timespec left = {line.grace_ms / 1000, line.grace_ms % 1000 * 1000000L};
        char byte;
        ssize_t got;
        free(arg);
        do got = read(line.fd, &byte, 1); while (got > 0 || (got < 0 && errno == EINTR));
        kill(getpid(), SIGTERM);
        while (nanosleep(&left, &left) < 0 && errno == EINTR) {}
        kill(getpid(), SIGKILL);
        return NULL;
    }

    /* 0, or an errno. */
    static int keven_start_lifeline(int fd, int grace_ms) {
        keven_lifeline *line = malloc(sizeof *line);
        pthread_attr_t attr;
        pthread_t thread;
        sigset_t all, before;
        int code;
        if (line == NULL) return ENOMEM;
        line->fd = fd;
        line->grace_ms = grace_ms;
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, 256 << 10);
        /* Signals are for the other threads. */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        code = pthread_create(&thread, &attr, keven_hold_lifeline, line);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attr);
        if (code != 0) free(line);
        return code;
    }
    """
    int start_lifeline "keven_start_lifeline"(int fd, int grace_ms)


def hold(int fd, int grace_ms):
    """From now on, when the other end of `fd` closes: SIGTERM to this process, and SIGKILL `grace_ms` later.

    `fd` has to stay open. What is written to the other end is read and ignored. Raises OSError when there can't be
    another thread.
    """
    cdef int code = start_lifeline(fd, grace_ms)
    if code != 0:
        raise OSError(code, "the thread that waits for the end of the launching process can't be started")
