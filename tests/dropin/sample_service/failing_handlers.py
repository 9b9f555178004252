"""Handlers that fail, for the retry topic and the dead-letter topic.

- ``retry_payment`` fails on the first attempt at each payment and succeeds on the second. Two lines for each
  `PaymentBounced`: ``attempt`` 1, then 2, at least one second apart (``at`` is in seconds); ``payment_id`` in both.
- ``mend_order`` fails always. With a `worker retry`, three lines for each `OrderBroken`, ``attempt`` 1, 2, 3: the
  first and the two retries that ``retry_detail`` allows its topic. Then one record in the dead-letter topic
  ``kafka_server.<server name>.dead``. With each failure a line with ``what`` = ``captured``, ``handler`` =
  ``mend_order``.

Attempts are counted in memory, by ``event.uuid``: a retried event keeps its uuid.
"""

import time
from collections import Counter

from keven_core.kafka.abstracts.event_handler import EventHandler

from .names import ShopEvents
from .record import handled, record

attempts = Counter()


def next_attempt(event):
    attempts[str(event.uuid)] += 1
    return attempts[str(event.uuid)]


def capture_exception(*args, **kwargs):
    """What the service's error tracker has instead of a network call."""
    record("captured", handler="mend_order")


class RetryPaymentHandler(EventHandler):
    event_name = ShopEvents.PAYMENT_BOUNCED

    def handle_event(self, event):
        attempt = next_attempt(event)
        handled("retry_payment", event, payment_id=event.details.payment_id, attempt=attempt, at=time.time())
        if attempt == 1:
            raise ConnectionError("the bank does not answer")


class MendOrderHandler(EventHandler):
    event_name = ShopEvents.ORDER_BROKEN
    capture_exception_handler = staticmethod(capture_exception)

    def handle_event(self, event):
        handled("mend_order", event, order_id=event.details.order_id, attempt=next_attempt(event))
        raise RuntimeError(f"order {event.details.order_id} cannot be mended")
