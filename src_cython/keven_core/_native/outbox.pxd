"""Messages on their way from the application to librdkafka and back: slots, and the queues that carry them.

    log() --outbox--> sender thread --> librdkafka --> delivery report --returned--> collect()

A slot is one message. The application's threads fill it and take it back under the GIL; in between it belongs to the
sender thread, which never takes the GIL and touches nothing of a message that was delivered but its address.

Ownership: a slot owns a reference to its value and key and, until librdkafka has taken them, its headers. The memory of
slots belongs to the Sender and is reused; it is given back when the producer is freed.
Queues: one thread pushes, one pops (the application's threads count as one, since they hold the GIL). Pointers stand in
chunks of 255, so a queue has no bound of its own; the one chunk in `spare` is used again, the others are freed.
"""

from cpython.object cimport PyObject
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from rdkafka cimport *


cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdatomic.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef __APPLE__
    #include <sys/prctl.h>
    #endif

    #define KEVEN_CHUNK 255
    #define KEVEN_SLAB 256
    #define KEVEN_AHEAD 8

    typedef struct keven_chunk {
        struct keven_chunk *next;
        void *items[KEVEN_CHUNK];
    } keven_chunk;

    typedef struct {
        /* the thread that pops */
        keven_chunk *head;
        size_t head_index;
        uint64_t popped;
        char apart[64];
        /* the thread that pushes */
        keven_chunk *tail;
        size_t tail_index;
        uint64_t pushed;
        /* both */
        _Atomic uint64_t published;
        _Atomic(keven_chunk *) spare;
    } keven_queue;

    /* What one sender of messages has out, counted under the GIL: by the slots that have been taken back. */
    typedef struct {
        int64_t produced;
        int64_t delivered;
        int64_t failed;
        int64_t held_bytes;
        int64_t max_messages;
        int64_t max_bytes;
        void *owner;          /* its DeliveryAccount; NULL: it is gone, the last slot frees this */
    } keven_account;

    typedef struct {
        rd_kafka_headers_t *headers;
        int64_t timestamp_ms;
        int32_t partition;
        PyObject *waiter;     /* the future of this very message; owned, or NULL */
        PyObject *gate;       /* of the event loop that awaits it; borrowed: gates live as long as their producer */
    } keven_extra;

    typedef struct keven_slot {
        const char *data;
        uint32_t size;
        int16_t err;
        uint8_t status;
        uint8_t in_scope;         /* whether it was logged in a handler */
        rd_kafka_topic_t *rkt;
        keven_account *account;
        union {
            keven_account *scope; /* the handler's */
            uint64_t number;      /* otherwise: the how manieth of its account */
        };
        PyObject *owner;      /* keeps `data` alive */
        PyObject *key;        /* bytes, or NULL */
        keven_extra *extra;   /* NULL: neither headers nor timestamp, partition or waiter */
    } keven_slot;

    typedef struct keven_slab {
        keven_slot slots[KEVEN_SLAB];  /* first, so that each is in one line of the cache */
        struct keven_slab *next;
    } keven_slab;
    _Static_assert(sizeof(void *) != 8 || sizeof(keven_slot) == 64, "a slot is one line of the cache");

    /* An event loop that is woken when messages have come back, through the pipe that it watches. */
    typedef struct keven_loop {
        struct keven_loop *next;
        int fd;
        atomic_int armed;
    } keven_loop;

    /* To which partition of a topic messages without a key go. */
    typedef struct keven_sticky {
        struct keven_sticky *next;
        const atomic_int *lulls;      /* of its sender */
        atomic_int seen_lulls;
        atomic_int partition;
        _Atomic int64_t left_bytes;   /* until another one is chosen */
        _Atomic uint32_t random;
        int64_t run_bytes;
    } keven_sticky;

    typedef struct {
        /* the application, under the GIL */
        keven_slot **free_slots;  /* a stack, so that those that are taken next are known without looking at them */
        size_t free_count;
        size_t slot_count;        /* also what the stack has room for */
        keven_slab *slabs;
        int64_t max_message_bytes;
        int64_t held;             /* slots that have not come back */
        keven_sticky *stickies;
        int64_t run_bytes;        /* of messages without a key that go to one partition; 0: librdkafka partitions */
        int eager;                /* no linger: messages are handed over at once, answers taken by whoever waits */
        char apart[64];
        /* both */
        keven_queue outbox;       /* slots: application to sender */
        keven_queue returned;     /* slots: sender to application */
        keven_queue events;       /* librdkafka's events but delivery reports: sender to application */
        atomic_int asleep;        /* the sender has to be woken when something is pushed */
        _Atomic uint64_t handed;  /* of what was pushed, librdkafka has got so many */
        atomic_int awaited;       /* messages that event loops wait for */
        atomic_int takers;        /* threads that wait and take delivery reports themselves */
        atomic_int stop;
        atomic_int lulls;         /* how often nothing was to be sent, counted every LULL_MS at most */
        atomic_int ended;         /* no more messages are taken: closed, or librdkafka can't go on */
        atomic_int watched;       /* somebody wants to know of every message that comes back */
        atomic_int calling;       /* what the attendant is called for has not been heeded */
        atomic_int waiting;       /* threads that wait for messages to come back */
        _Atomic uint64_t moves;   /* how often messages have come back */
        _Atomic(keven_loop *) loops;
        pthread_mutex_t lock;
        pthread_mutex_t taking;   /* held by the thread that takes delivery reports; never taken under the other */
        pthread_cond_t pushed;
        pthread_cond_t moved;
        pthread_cond_t called;
        int64_t lull_ms;          /* the sender's: when it counted the last lull */
        pthread_t thread;
        int running;
        rd_kafka_t *rk;
        rd_kafka_queue_t *queue;
    } keven_sender;

    static inline int keven_queue_init(keven_queue *queue) {
        memset(queue, 0, sizeof(*queue));
        queue->head = queue->tail = (keven_chunk *)malloc(sizeof(keven_chunk));
        return queue->head == NULL ? -1 : 0;
    }

    static inline void keven_queue_free(keven_queue *queue) {
        while (queue->head != NULL) {
            keven_chunk *next = queue->head == queue->tail ? NULL : queue->head->next;
            free(queue->head);
            queue->head = next;
        }
        free(atomic_exchange(&queue->spare, NULL));
    }

    /* 0, or -1 when there is no memory. Seen by the other side after keven_queue_publish(). */
    static inline int keven_queue_push(keven_queue *queue, void *item) {
        if (queue->tail_index == KEVEN_CHUNK) {
            keven_chunk *chunk = atomic_exchange_explicit(&queue->spare, NULL, memory_order_acquire);
            if (chunk == NULL) chunk = (keven_chunk *)malloc(sizeof(keven_chunk));
            if (chunk == NULL) return -1;
            queue->tail->next = chunk;
            queue->tail = chunk;
            queue->tail_index = 0;
        }
        queue->tail->items[queue->tail_index++] = item;
        queue->pushed++;
        return 0;
    }

    static inline uint64_t keven_queue_pushed(const keven_queue *queue) { return queue->pushed; }

    static inline void keven_queue_publish(keven_queue *queue) {
        atomic_store_explicit(&queue->published, queue->pushed, memory_order_release);
    }

    static inline uint64_t keven_queue_ready(keven_queue *queue) {
        return atomic_load_explicit(&queue->published, memory_order_acquire) - queue->popped;
    }

    /* Only when keven_queue_ready() says that there is one. */
    static inline void *keven_queue_pop(keven_queue *queue) {
        if (queue->head_index == KEVEN_CHUNK) {
            keven_chunk *done = queue->head;
            queue->head = done->next;
            queue->head_index = 0;
            free(atomic_exchange_explicit(&queue->spare, done, memory_order_release));
        }
        queue->popped++;
        return queue->head->items[queue->head_index++];
    }

    /* The item `ahead` places behind the next one, which has to be ready too; NULL where the chunk ends. */
    static inline void *keven_queue_peek(keven_queue *queue, size_t ahead) {
        size_t index = queue->head_index + ahead;
        return index < KEVEN_CHUNK ? queue->head->items[index] : NULL;
    }

    static inline keven_sender *keven_new_sender(void) {
        keven_sender *sender = (keven_sender *)calloc(1, sizeof(keven_sender));
        pthread_condattr_t attributes;
        if (sender == NULL) return NULL;
        if (keven_queue_init(&sender->outbox) || keven_queue_init(&sender->returned)
            || keven_queue_init(&sender->events)) {
            keven_queue_free(&sender->outbox);
            keven_queue_free(&sender->returned);
            keven_queue_free(&sender->events);
            free(sender);
            return NULL;
        }
        pthread_condattr_init(&attributes);
    #ifndef __APPLE__
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    #endif
        pthread_mutex_init(&sender->lock, NULL);
        pthread_mutex_init(&sender->taking, NULL);
        pthread_cond_init(&sender->pushed, &attributes);
        pthread_cond_init(&sender->moved, &attributes);
        pthread_cond_init(&sender->called, &attributes);
        pthread_condattr_destroy(&attributes);
        return sender;
    }

    /* Only when the sender thread has ended and the queues are empty. */
    static inline void keven_free_sender(keven_sender *sender) {
        while (sender->slabs != NULL) {
            keven_slab *next = sender->slabs->next;
            free(sender->slabs);
            sender->slabs = next;
        }
        free(sender->free_slots);
        while (sender->stickies != NULL) {
            keven_sticky *next = sender->stickies->next;
            free(sender->stickies);
            sender->stickies = next;
        }
        keven_loop *loop = atomic_load(&sender->loops);
        while (loop != NULL) {
            keven_loop *next = loop->next;
            free(loop);
            loop = next;
        }
        keven_queue_free(&sender->outbox);
        keven_queue_free(&sender->returned);
        keven_queue_free(&sender->events);
        pthread_cond_destroy(&sender->pushed);
        pthread_cond_destroy(&sender->moved);
        pthread_cond_destroy(&sender->called);
        pthread_mutex_destroy(&sender->lock);
        pthread_mutex_destroy(&sender->taking);
        free(sender);
    }

    /* Whether there are more free slots than before; 0: no memory. */
    static inline int keven_add_slab(keven_sender *sender) {
        size_t count = sender->slot_count + KEVEN_SLAB;
        keven_slot **stack = (keven_slot **)realloc(sender->free_slots, count * sizeof(keven_slot *));
        keven_slab *slab;
        if (stack == NULL) return 0;
        sender->free_slots = stack;
        if (posix_memalign((void **)&slab, 64, sizeof(keven_slab))) return 0;
        slab->next = sender->slabs;
        sender->slabs = slab;
        sender->slot_count = count;
        for (size_t i = KEVEN_SLAB; i > 0; i--) sender->free_slots[sender->free_count++] = &slab->slots[i - 1];
        return 1;
    }

    /* A free slot, or NULL when there is no memory. Under the GIL. */
    static inline keven_slot *keven_take_slot(keven_sender *sender) {
        if (sender->free_count == 0 && !keven_add_slab(sender)) return NULL;
        sender->free_count--;
        /* It was last in the cache when it came back, or when the sender had it. */
        if (sender->free_count >= KEVEN_AHEAD)
            __builtin_prefetch(sender->free_slots[sender->free_count - KEVEN_AHEAD], 1, 3);
        return sender->free_slots[sender->free_count];
    }

    static inline void keven_free_slot(keven_sender *sender, keven_slot *slot) {
        sender->free_slots[sender->free_count++] = slot;
    }

    static inline keven_sticky *keven_new_sticky(keven_sender *sender) {
        keven_sticky *sticky = (keven_sticky *)calloc(1, sizeof(keven_sticky));
        struct timespec now;
        if (sticky == NULL) return NULL;
        clock_gettime(CLOCK_REALTIME, &now);
        atomic_store(&sticky->random, ((uint32_t)now.tv_nsec ^ (uint32_t)(uintptr_t)sticky ^ (uint32_t)getpid()) | 1);
        sticky->lulls = &sender->lulls;
        sticky->run_bytes = sender->run_bytes;
        sticky->next = sender->stickies;
        sender->stickies = sticky;
        return sticky;
    }

    /* Whether messages of `size` bytes still go where the last one went, which is then in `partition`. */
    static inline int keven_sticks(keven_sticky *sticky, int64_t size, int32_t *partition) {
        *partition = atomic_load_explicit(&sticky->partition, memory_order_relaxed);
        int64_t left = atomic_load_explicit(&sticky->left_bytes, memory_order_relaxed) - size;
        atomic_store_explicit(&sticky->left_bytes, left, memory_order_relaxed);
        return left >= 0 && atomic_load_explicit(&sticky->seen_lulls, memory_order_relaxed)
            == atomic_load_explicit(sticky->lulls, memory_order_relaxed);
    }

    static inline void keven_stick(keven_sticky *sticky, int32_t partition) {
        atomic_store(&sticky->seen_lulls, atomic_load(sticky->lulls));
        atomic_store(&sticky->left_bytes, sticky->run_bytes);
        atomic_store(&sticky->partition, partition);
    }

    static inline uint32_t keven_random(keven_sticky *sticky) {  /* xorshift32 */
        uint32_t x = atomic_load_explicit(&sticky->random, memory_order_relaxed);
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        atomic_store_explicit(&sticky->random, x, memory_order_relaxed);
        return x;
    }

    static inline int64_t keven_monotonic_ms(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }

    /* Wait until the condition is signalled or the time is over; the lock is held. */
    static inline void keven_wait(pthread_cond_t *condition, pthread_mutex_t *lock, long timeout_ms) {
        struct timespec until;
    #ifdef __APPLE__
        until.tv_sec = timeout_ms / 1000;
        until.tv_nsec = timeout_ms % 1000 * 1000000;
        pthread_cond_timedwait_relative_np(condition, lock, &until);
    #else
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += timeout_ms / 1000;
        until.tv_nsec += timeout_ms % 1000 * 1000000;
        if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
        pthread_cond_timedwait(condition, lock, &until);
    #endif
    }

    /* Wait until messages have come back since `seen`, `timeout_ms` at most. Without the GIL. */
    static inline void keven_await_moves(keven_sender *sender, uint64_t seen, long timeout_ms) {
        pthread_mutex_lock(&sender->lock);
        atomic_fetch_add(&sender->waiting, 1);
        if (atomic_load(&sender->moves) == seen) keven_wait(&sender->moved, &sender->lock, timeout_ms);
        atomic_fetch_sub(&sender->waiting, 1);
        pthread_mutex_unlock(&sender->lock);
    }

    /* Wait until there is something to do for the sender thread, `timeout_ms` at most. */
    static inline void keven_await_push(keven_sender *sender, long timeout_ms) {
        pthread_mutex_lock(&sender->lock);
        if (keven_queue_ready(&sender->outbox) == 0 && !atomic_load(&sender->stop)
            && (!atomic_load(&sender->awaited) || atomic_load(&sender->takers)))
            keven_wait(&sender->pushed, &sender->lock, timeout_ms);
        pthread_mutex_unlock(&sender->lock);
    }

    static inline void keven_wake_sender(keven_sender *sender) {
        pthread_mutex_lock(&sender->lock);
        pthread_cond_signal(&sender->pushed);
        pthread_mutex_unlock(&sender->lock);
    }

    static inline int keven_start_taking(keven_sender *sender, int wait) {
        return (wait ? pthread_mutex_lock(&sender->taking) : pthread_mutex_trylock(&sender->taking)) == 0;
    }

    /* Whoever waits beside the thread that took delivery reports may take them next. */
    static inline void keven_stop_taking(keven_sender *sender) {
        pthread_mutex_unlock(&sender->taking);
        if (atomic_load(&sender->takers)) {
            pthread_mutex_lock(&sender->lock);
            pthread_cond_broadcast(&sender->moved);
            pthread_mutex_unlock(&sender->lock);
        }
    }

    /* Wait until the attendant is called, `timeout_ms` at most; whether it was. Without the GIL. */
    static inline int keven_await_call(keven_sender *sender, long timeout_ms) {
        int called;
        pthread_mutex_lock(&sender->lock);
        if (!atomic_load(&sender->calling)) keven_wait(&sender->called, &sender->lock, timeout_ms);
        called = atomic_exchange(&sender->calling, 0);
        pthread_mutex_unlock(&sender->lock);
        return called;
    }

    static inline void keven_call_attendant(keven_sender *sender) {
        pthread_mutex_lock(&sender->lock);
        atomic_store(&sender->calling, 1);
        pthread_cond_broadcast(&sender->called);
        pthread_mutex_unlock(&sender->lock);
    }

    static inline void keven_wake_loop(keven_loop *loop) {
        if (loop->fd >= 0 && atomic_exchange(&loop->armed, 0))
            while (write(loop->fd, "r", 1) < 0 && errno == EINTR) {}
    }

    /* Messages have come back: publish them and tell whoever waits. */
    static inline void keven_tell(keven_sender *sender) {
        keven_loop *loop;
        keven_queue_publish(&sender->returned);
        atomic_fetch_add(&sender->moves, 1);
        if (atomic_load(&sender->waiting)) {
            pthread_mutex_lock(&sender->lock);
            pthread_cond_broadcast(&sender->moved);
            pthread_mutex_unlock(&sender->lock);
        }
        if (atomic_load(&sender->loops) != NULL) {
            pthread_mutex_lock(&sender->lock);  /* a loop's pipe is closed under it */
            for (loop = atomic_load(&sender->loops); loop != NULL; loop = loop->next) keven_wake_loop(loop);
            pthread_mutex_unlock(&sender->lock);
        }
    }

    /* A loop that is woken through `fd`, armed; NULL when there is no memory. */
    static inline keven_loop *keven_use_loop(keven_sender *sender, int fd) {
        keven_loop *loop;
        pthread_mutex_lock(&sender->lock);
        for (loop = atomic_load(&sender->loops); loop != NULL && loop->fd >= 0; loop = loop->next) {}
        if (loop == NULL && (loop = (keven_loop *)calloc(1, sizeof(keven_loop))) != NULL) {
            loop->next = atomic_load(&sender->loops);
            atomic_store(&sender->loops, loop);
        }
        if (loop != NULL) {
            loop->fd = fd;
            atomic_store(&loop->armed, 1);
        }
        pthread_mutex_unlock(&sender->lock);
        return loop;
    }

    /* A negative `fd` ends that the loop is woken. */
    static inline void keven_set_loop(keven_sender *sender, keven_loop *loop, int fd) {
        pthread_mutex_lock(&sender->lock);
        loop->fd = fd;
        pthread_mutex_unlock(&sender->lock);
    }

    static inline int keven_start_thread(keven_sender *sender, void *(*main)(void *)) {
        sigset_t all, before;
        int failed;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  /* signals are for the application's threads */
        failed = pthread_create(&sender->thread, NULL, main, sender);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        sender->running = !failed;
        return failed;
    }

    /* For those who look at the threads of a process; called by the thread itself. */
    static inline void keven_name_thread(void) {
    #ifdef __APPLE__
        pthread_setname_np("keven-sender");
    #else
        prctl(PR_SET_NAME, "keven-sender", 0, 0, 0);
    #endif
    }

    static inline void keven_join_thread(keven_sender *sender) {
        if (sender->running) pthread_join(sender->thread, NULL);
        sender->running = 0;
    }

    static inline const char *keven_key_of(const keven_slot *slot, size_t *size) {
        *size = slot->key == NULL ? 0 : PyBytes_GET_SIZE(slot->key);
        return slot->key == NULL ? NULL : PyBytes_AS_STRING(slot->key);
    }

    static inline void keven_fence(void) { atomic_thread_fence(memory_order_seq_cst); }
    """
    ctypedef struct Queue "keven_queue":
        pass
    ctypedef struct Account "keven_account":
        int64_t produced
        int64_t delivered
        int64_t failed
        int64_t held_bytes
        int64_t max_messages
        int64_t max_bytes
        void *owner
    ctypedef struct Extra "keven_extra":
        rd_kafka_headers_t *headers
        int64_t timestamp_ms
        int32_t partition
        PyObject *waiter
        PyObject *gate
    ctypedef struct Slot "keven_slot":
        const char *data
        uint32_t size
        int16_t err
        uint8_t status
        bint in_scope
        rd_kafka_topic_t *rkt
        Account *account
        Account *scope
        uint64_t number
        PyObject *owner
        PyObject *key
        Extra *extra
    ctypedef struct Loop "keven_loop":
        Loop *next
        int fd
        int armed
    ctypedef struct Sticky "keven_sticky":
        pass
    ctypedef struct Sender "keven_sender":
        int64_t run_bytes
        int64_t lull_ms
        int lulls
        int64_t max_message_bytes
        int64_t held
        int eager
        Queue outbox
        Queue returned
        Queue events
        int asleep
        uint64_t handed
        int awaited
        int takers
        int stop
        int ended
        int watched
        int waiting
        uint64_t moves
        Loop *loops
        int running
        rd_kafka_t *rk
        rd_kafka_queue_t *queue

    int queue_push "keven_queue_push"(Queue *queue, void *item) noexcept nogil
    uint64_t queue_pushed "keven_queue_pushed"(const Queue *queue) noexcept nogil
    void queue_publish "keven_queue_publish"(Queue *queue) noexcept nogil
    uint64_t queue_ready "keven_queue_ready"(Queue *queue) noexcept nogil
    void *queue_pop "keven_queue_pop"(Queue *queue) noexcept nogil
    void *queue_peek "keven_queue_peek"(Queue *queue, size_t ahead) noexcept nogil
    Sender *new_sender "keven_new_sender"() noexcept nogil
    void free_sender "keven_free_sender"(Sender *sender) noexcept nogil
    Slot *take_slot "keven_take_slot"(Sender *sender) noexcept nogil
    void free_slot "keven_free_slot"(Sender *sender, Slot *slot) noexcept nogil
    Sticky *new_sticky "keven_new_sticky"(Sender *sender) noexcept nogil
    bint sticks "keven_sticks"(Sticky *sticky, int64_t size, int32_t *partition) noexcept nogil
    void stick "keven_stick"(Sticky *sticky, int32_t partition) noexcept nogil
    uint32_t random_of "keven_random"(Sticky *sticky) noexcept nogil
    int64_t monotonic_ms "keven_monotonic_ms"() noexcept nogil
    void await_moves "keven_await_moves"(Sender *sender, uint64_t seen, long timeout_ms) noexcept nogil
    void await_push "keven_await_push"(Sender *sender, long timeout_ms) noexcept nogil
    void wake_sender "keven_wake_sender"(Sender *sender) noexcept nogil
    bint start_taking "keven_start_taking"(Sender *sender, bint wait) noexcept nogil
    void stop_taking "keven_stop_taking"(Sender *sender) noexcept nogil
    int await_call "keven_await_call"(Sender *sender, long timeout_ms) noexcept nogil
    void call_attendant "keven_call_attendant"(Sender *sender) noexcept nogil
    void tell "keven_tell"(Sender *sender) noexcept nogil
    void wake_loop "keven_wake_loop"(Loop *loop) noexcept nogil
    Loop *use_loop "keven_use_loop"(Sender *sender, int fd) noexcept nogil
    void set_loop "keven_set_loop"(Sender *sender, Loop *loop, int fd) noexcept nogil
    int start_thread "keven_start_thread"(Sender *sender, void *(*main)(void *) noexcept nogil) noexcept nogil
    void name_thread "keven_name_thread"() noexcept nogil
    void join_thread "keven_join_thread"(Sender *sender) noexcept nogil
    const char *key_of "keven_key_of"(const Slot *slot, size_t *size) noexcept nogil
    void fence "keven_fence"() noexcept nogil
