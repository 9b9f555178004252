"""What the shop's tests put in the place of Kafka: a logger, a publisher, a producer and an I/O server.

They have what the original asked of such objects and nothing more.
"""

from .record import plain_name, record


class StandInLogger:
    """For a publisher: keeps what it is given. Line: ``what`` = ``logged``, ``topic``, ``is_bytes``."""

    def __init__(self):
        self.messages = []

    def log(self, data, topic=None):
        self.messages.append(data)
        record("logged", topic=topic, is_bytes=isinstance(data, bytes))


class StandInPublisher:
    """For `keven_set_publisher`. Line: ``what`` = ``published``, ``name``, ``type``."""

    def log_event(self, event, topic=None):
        record("published", name=plain_name(event.event_name), type=type(event).__name__)


class Delivered:
    """A delivered message, as delivery callbacks get it."""

    def __init__(self, topic, value):
        self._topic = topic
        self._value = value

    def error(self):
        return None

    def topic(self):
        return self._topic

    def value(self):
        return self._value

    def partition(self):
        return 0

    def offset(self):
        return 0


class StandInProducer:
    """For a logger's ``producer``. Lines: ``what`` = ``produced`` (``topic``, ``value``) and ``what`` = ``flushed``."""

    def __init__(self):
        self.waiting = []

    def produce(self, topic, value, on_delivery=None):
        record("produced", topic=topic, value=bytes(value).decode())
        self.waiting.append((Delivered(topic, value), on_delivery))

    def flush(self, timeout=None):
        waiting, self.waiting = self.waiting, []
        for message, on_delivery in waiting:
            if on_delivery is not None:
                on_delivery(None, message)
        record("flushed")
        return 0


class ReplayServer:
    """An I/O server that plays messages to its runners and ends."""

    client_id = "shop_replay"

    def __init__(self, messages):
        self.messages = messages
        self.runners = []

    def add_runner(self, runner):
        self.runners.append(runner)

    async def run_server(self):
        for message in self.messages:
            for runner in self.runners:
                runner.run(message)
