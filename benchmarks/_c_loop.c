/*
 * The floor under every producer: a loop that hands bytes to librdkafka, without copies, without Python, without the GIL.
 *
 * Compiled and loaded by _c_loop.py. No header of librdkafka is needed: its functions come as pointers, taken from the
 * library that confluent-kafka brings, and of its public structs only the first field of a message is read.
 */

#include <stddef.h>
#include <stdint.h>

enum { PARTITION_UA = -1, QUEUE_FULL = -184, QUEUE_FULL_WAIT_MS = 10 };

/* The order of the fields is that of _Api in _c_loop.py. */
struct api {
    int (*produce)(void *topic, int32_t partition, int flags, void *payload, size_t size, const void *key,
                   size_t key_size, void *opaque);
    int (*last_error)(void);
    int (*poll)(void *client, int timeout_ms);
    int (*flush)(void *client, int timeout_ms);
};

struct counts {
    int64_t delivered;
    int64_t failed;
};

/* dr_msg_cb: called by poll() and flush(), in the thread that calls those. The first field of a message is its error. */
void on_delivery(void *client, const int *message, void *opaque) {
    struct counts *counts = opaque;
    (void)client;
    if (*message)
        counts->failed++;
    else
        counts->delivered++;
}

/*
 * Hands `count` messages over, serving delivery reports after every `poll_every` of them and while the queue is full.
 * The payloads stay the caller's until their reports. Returns 0, or the first error.
 */
int send_all(const struct api *api, void *client, void *topic, void *const *payloads, const size_t *sizes,
             int64_t count, int64_t poll_every) {
    int64_t at, next_poll = poll_every;
    for (at = 0; at < count; at++) {
        while (api->produce(topic, PARTITION_UA, 0, payloads[at], sizes[at], NULL, 0, NULL)) {
            int error = api->last_error();
            if (error != QUEUE_FULL)
                return error;
            api->poll(client, QUEUE_FULL_WAIT_MS);
        }
        if (at + 1 == next_poll) {
            api->poll(client, 0);
            next_poll += poll_every;
        }
    }
    return 0;
}

/* Waits for the reports that are still to come; returns 0 or an error. */
int finish(const struct api *api, void *client, int timeout_ms) {
    return api->flush(client, timeout_ms);
}
