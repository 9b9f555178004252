"""The compiled hot path: consumer, producer, dispatch table and their binding of librdkafka."""
