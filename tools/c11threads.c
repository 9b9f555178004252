/* C11 threads in terms of pthreads, for ThreadSanitizer: it knows the calls of pthreads only, and librdkafka makes
 * C11's. Without this it takes librdkafka's threads for none, and does not see what their locks put in order.
 * To be preloaded after the sanitizer's own library; glibc's types are those of pthreads by another name. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <threads.h>

_Static_assert(sizeof(mtx_t) == sizeof(pthread_mutex_t), "mtx_t is a pthread_mutex_t");
_Static_assert(sizeof(cnd_t) == sizeof(pthread_cond_t), "cnd_t is a pthread_cond_t");
_Static_assert(sizeof(thrd_t) == sizeof(pthread_t), "thrd_t is a pthread_t");

static int result_of(int code) {
    return code == 0 ? thrd_success : code == ETIMEDOUT ? thrd_timedout : code == EBUSY ? thrd_busy
        : code == ENOMEM ? thrd_nomem : thrd_error;
}

typedef struct { thrd_start_t start; void *argument; } start_of_thread;

static void *run(void *given) {
    start_of_thread start = *(start_of_thread *)given;
    free(given);
    return (void *)(intptr_t)start.start(start.argument);
}

int thrd_create(thrd_t *thread, thrd_start_t start, void *argument) {
    start_of_thread *given = malloc(sizeof(*given));
    int code;
    if (given == NULL) return thrd_nomem;
    *given = (start_of_thread){start, argument};
    code = pthread_create((pthread_t *)thread, NULL, run, given);
    if (code) free(given);
    return result_of(code);
}

int thrd_join(thrd_t thread, int *result) {
    void *value;
    int code = pthread_join((pthread_t)thread, &value);
    if (code == 0 && result) *result = (int)(intptr_t)value;
    return result_of(code);
}

int mtx_init(mtx_t *mutex, int type) {
    pthread_mutexattr_t attributes;
    int code;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, type & mtx_recursive ? PTHREAD_MUTEX_RECURSIVE : PTHREAD_MUTEX_NORMAL);
    code = pthread_mutex_init((pthread_mutex_t *)mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return result_of(code);
}

void mtx_destroy(mtx_t *mutex) { pthread_mutex_destroy((pthread_mutex_t *)mutex); }
int mtx_lock(mtx_t *mutex) { return result_of(pthread_mutex_lock((pthread_mutex_t *)mutex)); }
int mtx_trylock(mtx_t *mutex) { return result_of(pthread_mutex_trylock((pthread_mutex_t *)mutex)); }
int mtx_unlock(mtx_t *mutex) { return result_of(pthread_mutex_unlock((pthread_mutex_t *)mutex)); }

int cnd_init(cnd_t *condition) { return result_of(pthread_cond_init((pthread_cond_t *)condition, NULL)); }
void cnd_destroy(cnd_t *condition) { pthread_cond_destroy((pthread_cond_t *)condition); }
int cnd_signal(cnd_t *condition) { return result_of(pthread_cond_signal((pthread_cond_t *)condition)); }
int cnd_broadcast(cnd_t *condition) { return result_of(pthread_cond_broadcast((pthread_cond_t *)condition)); }

int cnd_wait(cnd_t *condition, mtx_t *mutex) {
    return result_of(pthread_cond_wait((pthread_cond_t *)condition, (pthread_mutex_t *)mutex));
}

int cnd_timedwait(cnd_t *condition, mtx_t *mutex, const struct timespec *until) {
    return result_of(pthread_cond_timedwait((pthread_cond_t *)condition, (pthread_mutex_t *)mutex, until));
}
