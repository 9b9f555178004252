"""The first steps of a run: the cluster has to answer, and the topics to be there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from keven_core.kafka._copies import COPY_TOPIC_CONFIG
from keven_core.kafka._drivers import Call, Steps
from keven_core.kafka.errors import BrokerUnavailableError, KafkaTimeoutError, UnknownTopicError

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer
    from keven_core.kafka._client_events import ClientEvents
    from keven_core.kafka._plan import Plan

__all__ = ["prepare_topics"]

logger = logging.getLogger("keven_core.kafka")

_TOPIC_WAIT_S = 10.0


def prepare_topics(plan: Plan, consumer: Consumer, events: ClientEvents, beat: Callable[[], None]) -> Steps:
    """Wait for the cluster; create the topics that are ours to create; the others must be there.

    `beat` is called again and again, to show that the server is alive. Raises UnknownTopicError, or what events.serve()
    raises.
    """
    named = [topic for topic in plan.topics if not topic.startswith("^")]
    deadline: float | None = None
    tried = False
    created: list[str] = []
    while True:
        beat()
        try:
            found = yield Call(lambda: consumer.metadata(3000), patient=True)
        except (BrokerUnavailableError, KafkaTimeoutError) as error:
            events.serve()
            events.warn_unreachable(error)
            yield Call(lambda: time.sleep(0.5), patient=True)
            continue
        finally:
            events.serve()
        events.connected = True
        missing = [topic for topic in named if found.get(topic, -3) < 0]
        if plan.settings.create_topics and not tried:
            tried = True
            if found.get(plan.dead_letter_topic, -3) < 0:
                yield _create_topics(plan, [plan.dead_letter_topic], COPY_TOPIC_CONFIG)
            ours = [topic for topic in missing if topic in plan.optional_topics or topic == plan.retry_topic]
            written = [topic for topic in plan.written_topics if found.get(topic, -3) < 0]
            if written:
                yield _create_topics(plan, written, {})
            if ours:
                created = yield _create_topics(plan, ours, {})
                continue
        required = [topic for topic in missing if topic not in plan.optional_topics]
        # The broker that is asked may not know yet what was just created. A topic that is unknown when it is
        # subscribed to is looked for again with librdkafka's next refresh of metadata, after 5 minutes.
        unseen = [topic for topic in created if topic in missing]
        if not required and not unseen:
            return
        now = time.monotonic()
        deadline = deadline or now + _TOPIC_WAIT_S
        if now > deadline:
            if not required:
                logger.warning("created, but not known at %s yet: %s", plan.address, ", ".join(unseen))
                return
            raise UnknownTopicError(
                f"topic(s) {', '.join(required)} do not exist on {plan.address}: create them, or check the names "
                f"(only default topics are created, by KEVEN_CREATE_TOPICS)",
                code=3,
                name="UNKNOWN_TOPIC_OR_PART",
            )
        yield Call(lambda: time.sleep(0.2), patient=True)


def _create_topics(plan: Plan, topics: list[str], config: Mapping[str, str]) -> Call:
    from keven_core.kafka.admin import create_topics

    return Call(lambda: create_topics(plan.settings, plan.address, topics, config=config), patient=True)
