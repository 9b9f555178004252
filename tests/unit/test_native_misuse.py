"""Compiled objects that are used as they should not be: an exception each time, never a crash.

Each case runs in a child process, since what is tested is that it survives.
"""

import pytest
from builds import run_python

HEAD = """
import gc
from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.handle import Client, Handle
from keven_core._native.membership import Membership
from keven_core._native.message import Payload, Record
from keven_core._native.mock import MockCluster
from keven_core._native.producer import DeliveryAccount, Producer
from keven_core.kafka.errors import KevenError

NOWHERE = {"bootstrap.servers": "127.0.0.1:1"}

def refused(call, *kinds):
    try:
        call()
    except kinds or (TypeError, ValueError, KevenError, BufferError, AttributeError) as error:
        assert str(error), type(error)
        return
    raise SystemExit(f"not refused: {call}")
"""

CASES = {
    "resolve None": """
table = DispatchTable([Route("A", print, raw=True)])
refused(lambda: table.resolve(None))
refused(lambda: table.resolve(b'{"event_name":"A"}', 5))
""",
    "a table without decoders of names": "refused(lambda: DispatchTable(()).resolve(b'{\"a\":1}'))",
    "a table that was never initialized": """
table = DispatchTable.__new__(DispatchTable)
assert table.resolve(b'{"event_name":"AAAAAAAA"}') == (None, None)
table.name_of(b'{"event_name":"AAAAAAAA"}', "t")
Route.__new__(Route)
repr(Route.__new__(Route))
""",
    "routes that are none": """
refused(lambda: DispatchTable([None]))
refused(lambda: DispatchTable(["A"]))
refused(lambda: DispatchTable(None))
refused(lambda: Route(None, print, raw=True))
refused(lambda: DispatchTable((), everything="A"))
""",
    "a table that is initialized twice": """
table = DispatchTable([Route("A", print, raw=True)])
try:
    table.__init__([Route("B", print, raw=True)])
except Exception:
    pass
table.resolve(b'{"event_name":"A"}')
table.resolve(b'{"event_name":"B"}')
""",
    "payloads made by hand": """
refused(Payload)
payload = Payload.__new__(Payload)
assert len(payload) == 0
refused(lambda: memoryview(payload))
""",
    "records made of nothing": """
repr(Record("t", 0, 0))
refused(lambda: Record("t", "0", 0))
refused(lambda: Record(5, 0, 0))
refused(lambda: Record())
assert Record.__new__(Record).value is None
""",
    "bases made by hand": """
Handle()
client = Client()
assert client.closed
client.wake()
client.drain_wake()
for call in (lambda: client.name, lambda: client.wake_fd, lambda: client.metadata(10),
             lambda: client.set_token("t", 0, "p", {}), lambda: client.set_token_failure("x")):
    refused(call, KevenError)
member = Membership()
assert member.ledger() == {} and member.assignment() == [] and member.take_notes() == []
refused(lambda: member.subscribe(["t"]), KevenError)
refused(lambda: member.assign([("t", 0, 0)]), KevenError)
refused(lambda: member.commit(10), KevenError)
""",
    "a consumer that was never initialized": """
consumer = Consumer.__new__(Consumer)
for call in (lambda: consumer.fetch(0), lambda: consumer.top_up(), lambda: consumer.drain(1, 0), consumer.serve,
             lambda: consumer.watermarks("t", 0, 10), lambda: consumer.seek([("t", 0, 0)], 10)):
    refused(call, KevenError)
refused(consumer.record_in_hand, LookupError)
refused(lambda: consumer.failed(ValueError("x")), KevenError)
consumer.finish_batch()
assert consumer.close()
""",
    "a consumer after close": """
consumer = Consumer({**NOWHERE, "group.id": "g"})
assert consumer.close(1000)
assert consumer.close(1000)
consumer.wake()
for call in (lambda: consumer.fetch(0), consumer.serve, lambda: consumer.subscribe(["t"]), lambda: consumer.name,
             lambda: consumer.assign([("t", 0, 0)]), lambda: consumer.unassign([]), lambda: consumer.commit(1),
             lambda: consumer.pause([("t", 0)]), lambda: consumer.resume([("t", 0)]), lambda: consumer.metadata(1),
             lambda: consumer.committed([("t", 0)], 1), lambda: consumer.offsets_for_times([("t", 0, 1)], 1),
             lambda: consumer.drain(1, 0), lambda: consumer.wake_fd, lambda: consumer.rebalance_protocol()):
    refused(call, KevenError)
assert consumer.ledger() == {}
consumer.finish_batch()
""",
    "a consumer that is initialized twice": """
consumer = Consumer({**NOWHERE, "group.id": "g"})
refused(lambda: consumer.__init__({**NOWHERE, "group.id": "g"}), KevenError)
consumer.close(1000)
""",
    "a consumer without a table passes over everything": """
from keven_core.testing import EmbeddedKafka
with EmbeddedKafka() as kafka:
    kafka.create_topic("t", 1)
    producer, account = Producer({"bootstrap.servers": kafka.bootstrap_servers}), DeliveryAccount()
    producer.produce("t", b'{"event_name":"A"}', account)
    assert producer.wait(account, 20)
    producer.close()
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "g"})
    consumer.assign([("t", 0, 0)], True)
    while not consumer.fetch(100):
        pass
    consumer.run()
    assert consumer.ledger()["t", 0]["skipped"] == 1
    consumer.close(5000)
""",
    "arguments of a consumer": """
refused(lambda: Consumer(None))
refused(lambda: Consumer({"group.id": 5}))
refused(lambda: Consumer({5: "g"}))
refused(lambda: Consumer({"no.such.property": "x"}))
refused(lambda: Consumer({}))
refused(lambda: Consumer({"group.id": "g"}, "no table"))
try:
    Consumer({"group.id": "g"}, batch_size=-1)
except (MemoryError, ValueError, KevenError):
    pass
consumer = Consumer({**NOWHERE, "group.id": "g"})
for wrong in (None, 5, [None], [("t",)], [(5, 0)], [("t", "0")], ["t"]):
    refused(lambda: consumer.pause(wrong), TypeError, AttributeError, IndexError, KevenError)
refused(lambda: consumer.subscribe([None]))
refused(lambda: consumer.failed(None), KevenError)
consumer.close(1000)
""",
    "arguments of a producer": """
refused(lambda: Producer(None))
producer, account = Producer(NOWHERE), DeliveryAccount()
refused(lambda: producer.produce("t", b"x", None))
refused(lambda: producer.produce("t", b"x", "account"))
refused(lambda: producer.produce(None, b"x", account))
refused(lambda: producer.produce("t", "text", account))
refused(lambda: producer.produce("t", bytearray(b"x"), account))
refused(lambda: producer.produce("t", b"x", account, key="text"))
for headers in (5, [5], [("a",)], [(b"a", b"b")], [("a", "b")], [("a", b"b", b"c")], [("ok", b"ok"), None]):
    refused(lambda: producer.produce("t", b"x", account, headers=headers))
refused(lambda: producer.produce("\\ud800", b"x", account))
refused(lambda: producer.produce("t", b"x", account, headers=[("\\ud800", b"x")]))
refused(lambda: producer.wait(None, 0))
assert account.produced == 0 and account.pending == 0
producer.close(100)
refused(lambda: producer.produce("t", b"x", account), KevenError)
refused(lambda: producer.serve(), KevenError)
refused(lambda: producer.wait(account, 0), KevenError)
refused(lambda: producer.queued, KevenError)
assert producer.close() == 0
""",
    "a producer that was never initialized": """
producer = Producer.__new__(Producer)
refused(lambda: producer.produce("t", b"x", DeliveryAccount()), KevenError)
assert producer.close() == 0
""",
    "a producer that is initialized twice": """
producer = Producer(NOWHERE)
refused(lambda: producer.__init__(NOWHERE), KevenError)
producer.close(100)
""",
    "an account that was never initialized": """
producer, account = Producer({**NOWHERE, "message.timeout.ms": "1"}), DeliveryAccount.__new__(DeliveryAccount)
try:
    producer.produce("t", b"x", account)
    producer.wait(account, 5)
except Exception:
    pass
try:
    producer.close(100)
except Exception:
    pass
""",
    "a cluster after close": """
cluster = MockCluster(1)
cluster.close()
cluster.close()
for call in (cluster.bootstrap_servers, lambda: cluster.create_topic("t", 1, 1), lambda: cluster.set_down(1, True),
             lambda: cluster.push_errors(0, [1]), lambda: cluster.set_rtt(1, 1), cluster.requests):
    refused(call, KevenError)
""",
    "arguments of a cluster": """
with_errors = MockCluster(1)
refused(lambda: with_errors.push_errors(0, ["x"]))
refused(lambda: with_errors.push_errors(0, None))
refused(lambda: with_errors.set_leader("t", 0, 99), KevenError)
refused(lambda: with_errors.set_down(99, True), KevenError)
refused(lambda: with_errors.create_topic(None, 1, 1))
with_errors.close()
""",
}


@pytest.mark.parametrize("case", CASES)
def test_misuse_is_an_exception(case: str) -> None:
    result = run_python("-W", "ignore::ResourceWarning", "-c", HEAD + CASES[case])
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr}"
    assert result.stderr == ""
