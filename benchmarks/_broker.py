"""The broker of a run: the one that `KAFKA` names, a running one, or one that is started and ended here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def broker() -> Iterator[str]:
    """The address of a real broker; ends the program with a sentence when there is none."""
    from keven_core.testing.real_kafka import KafkaUnavailable, real_kafka

    try:
        kafka = real_kafka()
    except KafkaUnavailable as error:
        sys.exit(f"no Kafka to measure on: {error}")
    with kafka:
        address = kafka.bootstrap_servers
        _check(address)
        yield address


def _check(address: str) -> None:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=10)
    except KafkaException as error:
        sys.exit(f"Kafka at {address} does not answer: {error.args[0].str()}")
