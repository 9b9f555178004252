"""Servers, launchers, loggers and settings."""

from datetime import datetime, timezone

from keven_core.kafka import (
    EventPublisher,
    EventReceiverServer,
    KafkaBatchLogger,
    KafkaConsumerServer,
    KafkaLogger,
    Runner,
    Settings,
    TopicPartition,
    start_events_receiver_process,
    start_events_receiver_server,
    start_events_receiver_server_async,
)
from keven_core.kafka.errors import CommitError, DeliveryError, DrainError, KafkaError
from keven_core.testing import EmbeddedKafka


class Mine(Runner):
    async def run(self, message: bytes, topic: str | None = None) -> None: ...


def on_assign(server: KafkaConsumerServer, partitions: list[TopicPartition]) -> None:
    for entry in partitions:
        reveal_type(entry.offset)  # R: int


server = KafkaConsumerServer(["topic"], runners=[Mine(), print], on_assign_topics=on_assign, start="earliest")
KafkaConsumerServer("topic", start=datetime.now(timezone.utc), settings=Settings(batch_size=5), until_end=True)
KafkaConsumerServer("topic", start={("topic", 0): 5}, on_start=[lambda: None], on_stop=lambda: None)
KafkaConsumerServer("topic", on_assign=on_assign, on_revoke=on_assign, on_lost=lambda server, partitions: None)
KafkaConsumerServer("topic", on_revoke=print)
KafkaConsumerServer("topic", on_lost=5)  # E: Argument "on_lost" to "KafkaConsumerServer" has incompatible type "int"; expected "Callable[[Any, list[TopicPartition]], Any] | None"  [arg-type]
KafkaConsumerServer("topic", start=5)  # E: Argument "start" to "KafkaConsumerServer" has incompatible type "int"; expected "str | datetime | Mapping[tuple[str, int], int]"  [arg-type]
KafkaConsumerServer()  # E: Missing positional argument "topics" in call to "KafkaConsumerServer"  [call-arg]

with server as running:
    reveal_type(running)  # R: keven_core.kafka.abstracts.consumer_server.KafkaConsumerServer
    reveal_type(running.assignment())  # R: list[tuple[str, int]]
    reveal_type(running.position())  # R: dict[tuple[str, int], int]
    reveal_type(running.committed())  # R: dict[tuple[str, int], int]
    reveal_type(running.ledger())  # R: dict[tuple[str, int], dict[str, int]]


async def embedded() -> None:
    async with server as same:
        reveal_type(same)  # R: keven_core.kafka.abstracts.consumer_server.KafkaConsumerServer
    await start_events_receiver_server_async("service")
    with EventReceiverServer(server) as events:
        reveal_type(events)  # R: keven_core.kafka.abstracts.message_server.MessageReceiverServer


process = start_events_receiver_process(server_name="service")
reveal_type(process.exitcode)  # R: int | None
reveal_type(process.is_alive())  # R: bool
start_events_receiver_server()  # E: Missing positional argument "server_name" in call to "start_events_receiver_server"  [call-arg]

with KafkaLogger(topic="t") as logger:
    reveal_type(logger)  # R: keven_core.kafka.logger.KafkaLogger
    logger.log(b"data")
with KafkaBatchLogger(topic="t") as batch:
    reveal_type(batch.flush())  # R: int
    EventPublisher(batch)

settings = Settings.from_env({"KEVEN_BATCH_SIZE": "5"})
reveal_type(settings)  # R: keven_core.kafka.config.Settings
reveal_type(settings.batch_size)  # R: int
reveal_type(settings.sasl_password)  # R: str | None
settings.batch_size = 5  # E: Property "batch_size" defined in "Settings" is read-only  [misc]

try:
    pass
except DrainError as error:
    reveal_type(error.records)  # R: list[tuple[str, int, int]]
    reveal_type(error.exit_code)  # R: int
except CommitError as error:
    reveal_type(error.offsets)  # R: list[tuple[str, int, int]]
except DeliveryError as error:
    reveal_type(error.failures[0].value)  # R: bytes | None
except KafkaError as error:
    reveal_type(error.code)  # R: int

with EmbeddedKafka() as kafka:
    reveal_type(kafka)  # R: keven_core.testing.embedded.EmbeddedKafka
    reveal_type(kafka.bootstrap_servers)  # R: str
    reveal_type(kafka.settings())  # R: keven_core.kafka.config.Settings
