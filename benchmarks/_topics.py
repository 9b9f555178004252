"""Topics of the benchmarks: made and filled once, then read by every contestant and round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent import futures
from contextlib import suppress
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks import _events
from keven_core.kafka.topics import dead_letter_topic, retry_topic

_PREFIX = "keven-bench"
# Part of the name: count it up when the payload changes.
_VERSION = 1
_WAIT_S = 30


def topic_name(kind: str, messages: int) -> str:
    """The name of a topic: it tells the content, so a topic that is there can be taken as it is."""
    return f"{_PREFIX}-v{_VERSION}-{kind}-{messages}"


def on_topic_count(messages: int) -> int:
    """How many messages are on a topic: the events and the markers."""
    return messages + 2 * _events.PARTITIONS


def _count(address: str, topic: str) -> int | None:
    """How many messages a topic holds; None: it is not there, or its beginning has been deleted."""
    consumer = Consumer({"bootstrap.servers": address, "group.id": f"{_PREFIX}-count"})
    try:
        known = consumer.list_topics(timeout=_WAIT_S).topics.get(topic)
        if known is None or known.error is not None or len(known.partitions) != _events.PARTITIONS:
            return None
        marks = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=_WAIT_S) for p in known.partitions]
        return None if any(low for low, _ in marks) else sum(high for _, high in marks)
    except KafkaException:
        return None
    finally:
        consumer.close()


def _admin(address: str) -> AdminClient:
    # Without its remarks on what it has not served when it ends.
    return AdminClient({"bootstrap.servers": address, "log_level": 4})


def create(
    address: str, topic: str, partitions: int = _events.PARTITIONS, config: Mapping[str, str] | None = None
) -> None:
    """Make a topic, in place of what may be there under its name."""
    admin = _admin(address)
    if topic in admin.list_topics(timeout=_WAIT_S).topics:
        admin.delete_topics([topic])[topic].result(_WAIT_S)
    settings = {"retention.ms": "-1", "max.message.bytes": str(8 << 20), **(config or {})}
    wanted = NewTopic(topic, partitions, 1, config=settings)
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            admin.create_topics([wanted])[topic].result(_WAIT_S)
            break
        except KafkaException:  # the deletion takes its time
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    while time.monotonic() < deadline:
        known = admin.list_topics(timeout=_WAIT_S).topics.get(topic)
        if known is not None and known.error is None and len(known.partitions) == partitions:
            return
        time.sleep(0.1)


def delete(address: str, topic: str) -> None:
    """Delete a topic."""
    admin = _admin(address)  # a temporary would end before its answer comes
    admin.delete_topics([topic])[topic].result(_WAIT_S)


def written(address: str, topic: str) -> int:
    """How many messages have ever been written to a topic: its high watermarks. Waits until its leaders answer."""
    consumer = Consumer({"bootstrap.servers": address, "group.id": f"{_PREFIX}-count"})
    deadline = time.monotonic() + _WAIT_S
    try:
        partitions = consumer.list_topics(topic, timeout=_WAIT_S).topics[topic].partitions
        while True:
            try:
                marks = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=_WAIT_S) for p in partitions]
                return sum(high for _, high in marks)
            except KafkaException:  # just made: its leaders don't know of it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
    finally:
        consumer.close()


def fill_producer(address: str, **options: Any) -> Producer:
    """A producer for filling topics: large batches, no compression, nothing lost, nothing twice."""
    return Producer(
        {
            "bootstrap.servers": address,
            "enable.idempotence": True,
            "linger.ms": 50,
            "batch.size": 1_000_000,
            "queue.buffering.max.messages": 1_000_000,
            "queue.buffering.max.kbytes": 1 << 20,
            **options,
        }
    )


def produce(producer: Producer, topic: str, partition: int, name: str, value: bytes, key: bytes | None = None) -> None:
    """Hand one event to the producer, waiting while its queue is full."""
    while True:
        try:
            producer.produce(topic, value, key, partition=partition, headers=[("event_name", name.encode())])
            return
        except BufferError:
            producer.poll(0.1)


def ensure(address: str, kind: str, messages: int) -> str:
    """The topic of a kind with that many events, filled now if it is not there; returns its name."""
    topic = topic_name(kind, messages)
    wanted = on_topic_count(messages)
    if _count(address, topic) == wanted:
        return topic
    create(address, topic)
    producer = fill_producer(address)
    for index, (partition, name, value, key) in enumerate(_events.on_topic(kind, messages)):
        produce(producer, topic, partition, name, value, key)
        if index % 1000 == 0:
            producer.poll(0)
    producer.flush()
    found = _count(address, topic)
    if found != wanted:
        raise RuntimeError(f"topic {topic} has {found} messages instead of {wanted}")
    return topic


def drop_copies(address: str, clients: list[str]) -> None:
    """Delete the retry and dead-letter topics of the servers of a run, as far as they were made."""
    admin = _admin(address)
    wanted = [name(client) for client in clients for name in (retry_topic, dead_letter_topic)]
    there = admin.list_topics(timeout=_WAIT_S).topics
    ours = [topic for topic in wanted if topic in there]
    for future in (admin.delete_topics(ours, operation_timeout=_WAIT_S) if ours else {}).values():
        with suppress(KafkaException):
            future.result(_WAIT_S)


def drop_groups(address: str, groups: list[str]) -> None:
    """Delete the consumer groups of a run; what can't be deleted expires by itself."""
    admin = AdminClient({"bootstrap.servers": address})
    with suppress(KafkaException, TimeoutError, futures.TimeoutError):
        # Those that the broker knows: the deletion of others is not answered by all releases.
        known = {group.group_id for group in admin.list_consumer_groups().result(_WAIT_S).valid}
        there = [group for group in groups if group in known]
        for future in (admin.delete_consumer_groups(there, request_timeout=_WAIT_S) if there else {}).values():
            with suppress(KafkaException):
                future.result(_WAIT_S)
