"""Moments in which a fork would leave locks behind that nobody in the child releases; so a fork waits for their end.

librdkafka's threads do not come along into a forked child, but the locks of the process do, as they are. Two kinds are
held for microseconds again and again, and would make every client of the child wait for ever:
- glibc's getaddrinfo locks the list of the machine's addresses (glibc 2.36, check_pf.c). librdkafka looks names up
  through look_up() (rdkafka.h, rd_kafka_conf_set_resolve_cb).
- OpenSSL, of which librdkafka takes random numbers, registers each thread that asks for its first one (OpenSSL 3,
  initthread.c). Threads ask for it in prepare_thread() (handle.pyx), and leave while a client is destroyed.

A fork waits for a bounded time: what takes longer is a lookup that waits for a name server, or a client that waits for
its threads, and does so without these locks.

Threads: hold_forks() and allow_forks() from any thread, without waiting for the GIL in between: the thread that forks
has it. They count, so they may be nested and overlap.
"""

from rdkafka cimport addrinfo


cdef extern from *:
    """
    #include <errno.h>
    #include <netdb.h>
    #include <pthread.h>
    #include <sys/socket.h>
    #include <time.h>

    #define KEVEN_FORK_WAITS_S 1

    static pthread_mutex_t keven_forks_lock = PTHREAD_MUTEX_INITIALIZER;
    static pthread_cond_t keven_forks_allowed = PTHREAD_COND_INITIALIZER;
    static int keven_forks_held = 0;

    static void keven_hold_forks(void) {
        pthread_mutex_lock(&keven_forks_lock);
        ++keven_forks_held;
        pthread_mutex_unlock(&keven_forks_lock);
    }

    static void keven_allow_forks(void) {
        pthread_mutex_lock(&keven_forks_lock);
        if (--keven_forks_held == 0) pthread_cond_broadcast(&keven_forks_allowed);
        pthread_mutex_unlock(&keven_forks_lock);
    }

    /* The lock stays taken until the fork is done, so that nothing begins that would hold it. */
    static void keven_before_fork(void) {
        struct timespec until;
        pthread_mutex_lock(&keven_forks_lock);
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += KEVEN_FORK_WAITS_S;
        while (keven_forks_held > 0
               && pthread_cond_timedwait(&keven_forks_allowed, &keven_forks_lock, &until) == 0) {}
    }

    static void keven_after_fork_in_parent(void) {
        pthread_mutex_unlock(&keven_forks_lock);
    }

    /* The threads that hold forks, or wait in one, did not come along. */
    static void keven_after_fork_in_child(void) {
        keven_forks_held = 0;
        pthread_cond_init(&keven_forks_allowed, NULL);
        pthread_mutex_unlock(&keven_forks_lock);
    }

    static int keven_watch_forks(void) {
        return pthread_atfork(keven_before_fork, keven_after_fork_in_parent, keven_after_fork_in_child);
    }

    static int keven_thread_is_new(void) {
        static _Thread_local int known = 0;
        if (known) return 0;
        known = 1;
        return 1;
    }

    static int keven_look_up(const char *node, const char *service, const struct addrinfo *hints,
                             struct addrinfo **found, void *opaque) {
        int code, error;
        (void)opaque;
        if (!node && !service && !hints) {
            freeaddrinfo(*found);
            return 0;
        }
        keven_hold_forks();
        code = getaddrinfo(node, service, hints, found);
        error = errno; /* which EAI_SYSTEM refers to */
        keven_allow_forks();
        errno = error;
        return code;
    }
    """
    void hold_forks "keven_hold_forks"() noexcept nogil
    void allow_forks "keven_allow_forks"() noexcept nogil
    # 0, or an errno.
    int watch_forks "keven_watch_forks"()
    # Whether this is the first call in this thread.
    bint thread_is_new "keven_thread_is_new"() noexcept nogil
    int look_up "keven_look_up"(
        const char *node, const char *service, const addrinfo *hints, addrinfo **found, void *opaque) noexcept nogil
