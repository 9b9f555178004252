"""Topic administration where speed does not matter: confluent-kafka's AdminClient.

Its objects stay in this module: they never meet the compiled clients.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import kafka_error

logger = logging.getLogger("keven_core.kafka")

__all__ = ["create_topics"]


def create_topics(
    settings: Settings,
    address: str,
    topics: Iterable[str],
    *,
    partitions: int = -1,
    config: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> list[str]:
    """Create topics; one that exists already is left as it is. Blocks up to `timeout_s`.

    `partitions` -1 takes the broker's default, as does the replication factor. Returns the topics that exist now;
    single brokers may learn of them later. Raises KafkaError.
    """
    with _fork_gate:
        _under_way.append(address)
    try:
        return _create_topics(settings, address, topics, partitions, config, timeout_s)
    finally:
        with _fork_gate:
            _under_way.remove(address)
            _fork_gate.notify_all()


def _create_topics(
    settings: Settings,
    address: str,
    topics: Iterable[str],
    partitions: int,
    config: Mapping[str, str] | None,
    timeout_s: float,
) -> list[str]:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    options: dict[str, Any] = dict(settings.client_options(address, "keven-admin"))
    source = settings.oauth_token
    if source is not None:
        options["oauth_cb"] = lambda given: source(given)[:2]
    client = AdminClient(options, logger=logger)
    new = [NewTopic(topic, partitions, -1, config=dict(config or {})) for topic in topics]
    there = []
    for topic, future in client.create_topics(new, operation_timeout=timeout_s, request_timeout=timeout_s).items():
        try:
            future.result(timeout_s + 5)
        except KafkaException as error:
            answer = error.args[0]
            # A broker without this request (librdkafka's embedded one) creates topics by itself when they are used.
            if answer.name() == "_UNSUPPORTED_FEATURE":
                continue
            if answer.name() != "TOPIC_ALREADY_EXISTS":
                raise kafka_error(
                    answer.code(), answer.name(), f"topic {topic} can't be created: {answer.str()}"
                ) from None
        there.append(topic)
    return there


# --- fork ------------------------------------------------------------------------------------------------------------

# The AdminClient's threads take locks that would stay locked in a child (forks.pxd says which, and waits for those of
# our own clients); besides, the import of a module that is under way at a fork never ends in the child.
_FORK_WAITS_S = 1.0
_fork_gate = threading.Condition()
_under_way: list[str] = []


def _before_fork() -> None:
    _fork_gate.acquire()
    _fork_gate.wait_for(lambda: not _under_way, _FORK_WAITS_S)


def _after_fork_in_child() -> None:
    global _fork_gate
    _fork_gate = threading.Condition()
    _under_way.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=lambda: _fork_gate.release(), after_in_child=_after_fork_in_child
)
