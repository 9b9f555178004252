"""The compiled modules through their stubs."""

from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.library import live_objects, struct_layout, version
from keven_core._native.message import Record
from keven_core._native.producer import DeliveryAccount, Producer

reveal_type(version())  # R: str
reveal_type(live_objects())  # R: dict[str, int]
reveal_type(struct_layout())  # R: dict[str, dict[str, int]]

table = DispatchTable([Route("A", print, raw=True)])
route, decoded = table.resolve(b"{}")
reveal_type(route)  # R: keven_core._native.dispatch.Route | None
reveal_type(table.name_of(b"{}", "topic"))  # R: str | None
table.resolve("{}")  # E: Argument 1 to "resolve" of "DispatchTable" has incompatible type "str"; expected "bytes"  [arg-type]


def failed(record: Record, stage: str, error: Exception) -> bool:
    return False


consumer = Consumer({"group.id": "g"}, table, failed, batch_size=5)
reveal_type(consumer.fetch(100))  # R: int
reveal_type(consumer.offsets())  # R: dict[tuple[str, int], tuple[int, int, int]]
reveal_type(consumer.watermarks("t", 0, 1))  # R: tuple[int, int]
reveal_type(consumer.close())  # R: bool
consumer.closed = True  # E: Property "closed" defined in "Client" is read-only  [misc]
for note in consumer.take_notes():
    if note[0] == "committed":
        reveal_type(note[2])  # R: keven_core.kafka.errors.KafkaError | None
    elif note[0] == "revoke":
        reveal_type(note[2])  # R: bool

producer, account = Producer({}), DeliveryAccount()
producer.produce("t", b"value", account, headers=[("a", b"b"), ("c", None)])
producer.produce("t", bytearray(b"x"), account)  # E: Argument 2 to "produce" of "Producer" has incompatible type "bytearray"; expected "bytes | None"  [arg-type]
producer.produce("t", b"x", None)  # E: Argument 3 to "produce" of "Producer" has incompatible type "None"; expected "DeliveryAccount"  [arg-type]
reveal_type(account.take_failures()[1][0][4])  # R: str


class Derived(Consumer): ...  # E: Cannot inherit from final class "Consumer"  [misc]
