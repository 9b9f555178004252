"""Finished messages go back to the thread that allocated them, which frees them.

librdkafka's broker thread allocates each message; freed by the consumer's thread, both fight for one arena of the C
library's allocator (measured: 8 % of the consumer's time in its lock, and a third of the drain rate). So the consumer
hands whole batches over, and the broker thread frees them when its next Fetch response arrives.

Ownership: a batch belongs to the consumer from new_batch() to give_back(), then to the Returns, which the client's
Handle frees after the client.
Threads: give_back(), new_batch() and free_returned() with the consumer's owner; the interceptor runs on broker threads.
Both lists are only ever pushed to one by one and taken as a whole, so there is no ABA problem and no lock.
"""

cdef extern from *:
    """
    #include <stdatomic.h>
    #include <stdint.h>
    #include <stdlib.h>

    typedef struct keven_batch {
        struct keven_batch *next;
        size_t count;
        size_t bytes;
        void *messages[];
    } keven_batch;

    typedef struct {
        _Atomic(keven_batch *) returned;  /* batches whose messages are to be freed */
        _Atomic(keven_batch *) empty;     /* batches whose messages have been freed */
        atomic_size_t waiting_bytes;
        keven_batch *spare;               /* the owner's: empty ones that it has taken */
        void (*destroy)(void *);
    } keven_returns;

    static inline void keven_push(_Atomic(keven_batch *) *list, keven_batch *batch) {
        batch->next = atomic_load_explicit(list, memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(list, &batch->next, batch, memory_order_release,
                                                      memory_order_relaxed)) {}
    }

    static void keven_free_messages(keven_returns *returns, keven_batch *batch) {
        for (size_t i = 0; i < batch->count; i++)
            if (batch->messages[i] != NULL) returns->destroy(batch->messages[i]);
    }

    static void keven_free_returned(keven_returns *returns) {
        keven_batch *batch = atomic_exchange_explicit(&returns->returned, NULL, memory_order_acquire);
        while (batch != NULL) {
            keven_batch *next = batch->next;
            keven_free_messages(returns, batch);
            atomic_fetch_sub_explicit(&returns->waiting_bytes, batch->bytes, memory_order_relaxed);
            keven_push(&returns->empty, batch);
            batch = next;
        }
    }

    static void keven_give_back(keven_returns *returns, keven_batch *batch) {
        atomic_fetch_add_explicit(&returns->waiting_bytes, batch->bytes, memory_order_relaxed);
        keven_push(&returns->returned, batch);
    }

    static keven_batch *keven_new_batch(keven_returns *returns, size_t capacity) {
        keven_batch *batch = returns->spare;
        if (batch == NULL) batch = atomic_exchange_explicit(&returns->empty, NULL, memory_order_acquire);
        if (batch == NULL) return (keven_batch *)calloc(1, sizeof(keven_batch) + capacity * sizeof(void *));
        returns->spare = batch->next;
        batch->bytes = 0;
        return batch;
    }

    /* Only when no other thread can come any more: the client is destroyed. */
    static inline void keven_free_returns(void *arg) {
        keven_returns *returns = (keven_returns *)arg;
        keven_batch *batch = returns->spare;
        for (int round = 0; round < 2; round++) {
            while (batch != NULL) {
                keven_batch *next = batch->next;
                free(batch);
                batch = next;
            }
            batch = atomic_exchange(&returns->empty, NULL);
        }
        free(returns);
    }
    """
    ctypedef struct Batch "keven_batch":
        size_t count
        size_t bytes
        void *messages[0]
    ctypedef struct Returns "keven_returns":
        size_t waiting_bytes
        void (*destroy)(void *message) noexcept nogil
    void free_messages "keven_free_messages"(Returns *returns, Batch *batch) noexcept nogil
    void free_returned "keven_free_returned"(Returns *returns) noexcept nogil
    void give_back "keven_give_back"(Returns *returns, Batch *batch) noexcept nogil
    Batch *new_batch "keven_new_batch"(Returns *returns, size_t capacity) noexcept nogil
    void free_returns "keven_free_returns"(void *returns) noexcept nogil
