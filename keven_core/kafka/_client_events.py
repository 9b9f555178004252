"""What librdkafka tells of a server's clients: log lines, errors, requests for tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from keven_core.kafka.errors import (
    AuthorizationError,
    BrokerUnavailableError,
    ConfigurationError,
    KafkaError,
    OffsetOutOfRangeError,
    UnknownTopicError,
    refused_credentials,
)
from keven_core.kafka.logs import RateLimiter, log_client_line, one_line

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer
    from keven_core.kafka._copies import CopyPublisher
    from keven_core.kafka._plan import Plan

__all__ = ["ClientEvents", "set_token"]

logger = logging.getLogger("keven_core.kafka")


class ClientEvents:
    """Says what the clients of one run tell, and raises what ends it. Owner thread only.

    Attributes:
        consumer, copies: the clients, once they are made; None before.
        connected: whether the cluster has answered once.
    """

    def __init__(self, plan: Plan) -> None:
        self.consumer: Consumer | None = None
        self.copies: CopyPublisher | None = None
        self.connected = False
        self._plan = plan
        self._limiter = RateLimiter(5, 10.0)
        self._slow_limiter = RateLimiter(1, 5.0)

    def serve(self) -> None:
        """Take what the clients have to tell, without waiting. Raises what ends the run."""
        if self.consumer is not None and not self.consumer.closed:
            for event in self.consumer.serve() or ():
                self.on_event(event)
        if self.copies is not None:
            self.copies.serve()

    def on_event(self, event: tuple[Any, ...]) -> None:
        """Handle an event of a client's main queue. Raises KafkaError when the client can't go on."""
        kind = event[0]
        if kind == "log":
            _, level, facility, text = event
            # Debug lines were asked for (level 7); the others repeat for as long as their cause lasts.
            if level > 6 or self._limiter.admit(f"log {facility}") is not None:
                log_client_line(logger, level, facility, text)
        elif kind == "error":
            self._on_client_error(event[1])
        elif kind == "token":
            self._refresh_token(event[1])

    def _on_client_error(self, error: KafkaError) -> None:
        if error.fatal:
            raise error
        # Before the first contact wrong credentials stay wrong; later the broker's own trouble can look the same.
        refused = refused_credentials(error)
        if refused is not None and not self.connected:
            raise refused
        if isinstance(error, BrokerUnavailableError):
            self.warn_unreachable(error)
        else:
            self.warn(error.name, "%s", error)

    def on_partition_error(self, topic: str | None, error: KafkaError) -> bool:
        """Handle an error that came in place of messages; false: it is of a topic that need not exist.

        Raises it when going on would lose some.
        """
        if error.fatal or isinstance(error, (AuthorizationError, OffsetOutOfRangeError)):
            raise error
        if error.name == "_BAD_MSG":
            # Going on would skip it: librdkafka can't tell where the next good message starts.
            raise error
        if isinstance(error, UnknownTopicError) and topic in self._plan.optional_topics:
            return False
        self.warn(error.name, "%s", error)
        return True

    def _refresh_token(self, config: str) -> None:
        source = self._plan.settings.oauth_token
        if self.consumer is not None:
            set_token(self.consumer, source, config)
        if self.copies is not None:
            self.copies.set_token(lambda producer: set_token(producer, source, config))

    def warn_unreachable(self, error: object) -> None:
        """Say, now and then, that no broker can be reached."""
        if self._slow_limiter.admit("unreachable") is not None:
            logger.warning("Kafka at %s can't be reached, trying again: %s", self._plan.address, one_line(error))

    def warn(self, key: str, message: str, detail: object) -> None:
        """Log a warning whose last argument is `detail`, unless there were many of this key."""
        quiet = self._limiter.admit(key)
        if quiet is not None:
            logger.warning(message + "%s", one_line(detail, 1000), f" ({quiet} more like this)" if quiet else "")


def set_token(client: Any, source: Any, config: str) -> None:
    """Ask the service's callback for an OAUTHBEARER token and hand it to a client; its failure is reported there."""
    try:
        token, expires_at_s, principal = source(config)
        client.set_token(token, int(expires_at_s * 1000), principal, {})
    except ConfigurationError:
        raise
    except Exception as error:
        logger.error("the OAUTHBEARER token callback failed: %s", one_line(error))
        client.set_token_failure(one_line(error))
