"""A service written against the original runs unchanged: tests/dropin/sample_service says what has to be observed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_services import read_topic, wait_until
from sample import Line, Sample

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def sample(tmp_path: Path, fresh_kafka: Any) -> Sample:
    """On a broker without topics."""
    return Sample(tmp_path, fresh_kafka.bootstrap_servers)


@contextmanager
def awake(sample: Sample, mode: str, drive: str = "ping", handler: str = "ping") -> Iterator[None]:
    """A worker meanwhile that has answered."""
    with sample.worker(mode) as process:

        def answered() -> bool:
            assert process.poll() is None, "the worker has ended"
            sample.run("drive", drive)
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                if sample.lines("handled", handler=handler):
                    return True
                time.sleep(0.05)
            return False

        wait_until(answered, "the worker answers")
        yield


def wait_for(sample: Sample, **counts: int) -> None:
    """Wait until handlers were called as often as that, and see that they and no others are."""
    wait_until(lambda: sample.handlers() == counts, f"handlers are called: {counts}; so far {sample.handlers()}", 45)


def of(sample: Sample, handler: str, *fields: str) -> list[Any]:
    """Fields of a handler's lines."""
    found = [tuple(line[field] for field in fields) for line in sample.lines("handled", handler=handler)]
    return [entry[0] for entry in found] if len(fields) == 1 else found


def test_events(sample: Sample) -> None:
    with awake(sample, "events"):
        sample.run("drive", "orders")
        wait_for(sample, send_invoice=3, count_order=3, file_invoice=3, book_payment=2, ship=1, change_stock=1)
        check_orders(sample)
        before = dict(sample.handlers())
        sample.run("drive", "commit")
        sample.run("drive", "delayed")
        sample.run("drive", "scan")
        wait_for(sample, **{**before, "send_invoice": 9, "count_order": 9, "file_invoice": 9, "read_scan": 2})
    assert of(sample, "send_invoice", "order_id") == [1, 2, 3, 11, 12, 13, 14, 21, 22]
    short, long = sample.lines("handled", handler="read_scan")
    assert (short["length"], short["offloads"], short["thread"]) == (100, [], "other")
    assert (long["length"], long["offloads"], long["first"]) == (2 << 20, ["text"], "x" * 10)
    assert not sample.lines("handled", handler="never_registered")
    assert sample.lines("worker", state="ended")


def check_orders(sample: Sample) -> None:
    assert next(line["what"] for line in sample.lines() if line["what"] in ("hook", "handled")) == "hook"
    assert {line["when"] for line in sample.lines("hook")} == {"before", "after"}
    first = sample.lines("handled", handler="send_invoice")[0]
    assert first["type"] == "OrderPlaced"
    wanted: Line = {"order_id": 1, "customer": "Ada", "amount": 10, "namespace": "north", "originator": "drive"}
    assert wanted.items() <= first.items()
    assert (first["has_uuid"], first["has_created"], first["command"]) == (True, True, None)
    assert of(sample, "file_invoice", "invoice_id", "order_id", "amount") == [
        ("inv-1", 1, 10),
        ("inv-2", 2, 20),
        ("inv-3", 3, 30),
    ]
    assert of(sample, "book_payment", "order_id", "amount", "currency", "in_loop") == [
        (1, 10, "EUR", True),
        (2, 20, "EUR", True),
    ]
    (shipped,) = sample.lines("handled", handler="ship")
    assert (shipped["quantity"], shipped["packed_at"]) == (5, "2020-01-02T03:04:05")
    assert shipped["lines"] == [["bolt", "OrderLine"], ["nut", "OrderLine"]]
    assert of(sample, "change_stock", "article", "change", "thread") == [("bolt", -5, "other")]


def test_commands_and_their_reports(sample: Sample, tmp_path: Path, fresh_kafka: Any) -> None:
    listening = Sample(tmp_path, fresh_kafka.bootstrap_servers, "shop-events")
    with awake(listening, "events"), awake(sample, "commands", "warm", "warm_cache"):
        assert sample.lines("server", type="CommandReceiverServer")
        sample.run("drive", "commands")
        wait_for(sample, place_order=1, cancel_order=1, archive_order=1, print_labels=1)
        wait_for(
            listening,
            send_invoice=1,
            count_order=1,
            file_invoice=1,
            place_order_started=1,
            place_order_completed=1,
            cancel_order_errored=1,
            archive_order_complete=1,
            print_labels_completed=1,
        )
    sent = {line["name"]: line["uuid"] for line in sample.lines("dispatched")}
    assert of(sample, "place_order", "uuid", "order_id", "user_id") == [(sent["PLACE_ORDER"], 31, "5")]
    assert of(sample, "cancel_order", "order_id", "reason") == [(32, "changed my mind")]
    assert of(sample, "archive_order", "order_id") == [33]
    assert of(sample, "print_labels", "count", "thread") == [(4, "other")]
    assert of(listening, "send_invoice", "namespace", "command") == [("south", sent["PLACE_ORDER"])]
    for handler, name in (
        ("place_order_started", "PLACE_ORDER"),
        ("place_order_completed", "PLACE_ORDER"),
        ("archive_order_complete", "ARCHIVE_ORDER"),
        ("print_labels_completed", "PRINT_LABELS"),
    ):
        assert of(listening, handler, "uuid", "type") == [(sent[name], "CommandEvent")]
    (errored,) = listening.lines("handled", handler="cancel_order_errored")
    assert (errored["uuid"], errored["type"]) == (sent["CANCEL_ORDER"], "CommandErrorEvent")
    assert "order 32 is paid already" in errored["error"]


@pytest.mark.parametrize(
    ("mode", "drive", "handler"), [("events-process", "ping", "ping"), ("commands-process", "warm", "warm_cache")]
)
def test_a_child_process(sample: Sample, mode: str, drive: str, handler: str) -> None:
    with awake(sample, mode, drive, handler):
        wait_until(lambda: sample.lines("worker", state="ended"), "the worker has ended its child and itself")
    (worker,) = sample.lines("worker", state="ended")
    assert {line["pid"] for line in sample.lines("handled")}.isdisjoint({worker["pid"]})
    (process,) = sample.lines("process")
    assert (process["was_alive"], process["is_alive"]) == (True, False)


def test_listeners(sample: Sample, tmp_path: Path, fresh_kafka: Any) -> None:
    by_topic = Sample(tmp_path, fresh_kafka.bootstrap_servers, "shop-topics")
    everything = Sample(tmp_path, fresh_kafka.bootstrap_servers, "shop-all")
    # Topics that come later are found with the next refresh of metadata.
    for name in ("_ping", "_order_placed", "_invoice_sent", ".audit", ""):
        fresh_kafka.create_topic(f"keven_events{name}")
    with awake(everything, "all-events"), sample.worker("listener"), by_topic.worker("listener-topics"):
        sample.run("drive", "audit")
        sample.run("drive", "orders")
        wait_until(lambda: sample.lines("worker", state="ended"), "the listener has ended by itself")
        wait_until(lambda: by_topic.lines("worker", state="ended"), "the other one too")
        wait_until(lambda: everything.handlers()["check_login"] == 1, "the audit event is seen with all others")
        wait_until(lambda: everything.handlers()["send_invoice"] == 3, "and the orders")
    assert sample.handlers() == {"check_login": 1}
    assert of(sample, "check_login", "user_id", "is_audit_event") == [(7, True)]
    assert by_topic.handlers()["send_invoice"] == by_topic.handlers()["count_order"] == 3
    assert set(by_topic.handlers()) == {"send_invoice", "count_order", "file_invoice"}


def test_failures_come_again(sample: Sample, fresh_kafka: Any) -> None:
    for name in ("keven_events_payment_bounced", "keven_events_order_broken"):
        fresh_kafka.create_topic(name)
    with sample.worker("retry"):
        wait_until(lambda: sample.lines("assigned"), "partitions are assigned")
        sample.run("drive", "failures")
        wait_for(sample, retry_payment=4, mend_order=3)
        wait_until(lambda: sample.lines("worker", state="ended"), "the worker has ended by itself")
    for payment in ("p1", "p2"):
        first, second = sample.lines("handled", payment_id=payment)
        assert (first["attempt"], second["attempt"]) == (1, 2)
        assert second["at"] - first["at"] >= 0.99
    assert of(sample, "mend_order", "attempt") == [1, 2, 3]
    assert len(sample.lines("captured", handler="mend_order")) == 3
    assert len(read_topic(fresh_kafka.direct_bootstrap_servers, "kafka_server.shop.dead")) == 1


def test_logs(sample: Sample, tmp_path: Path, fresh_kafka: Any) -> None:
    for name in ("shop_log", "shop_batch_log"):
        fresh_kafka.create_topic(name)
    with sample.worker("lines"):
        wait_until(lambda: sample.lines("assigned"), "partitions are assigned")
        sample.run("drive", "logs")
        wait_until(lambda: sample.lines("worker", state="ended"), "the worker has ended by itself")
    assert sample.lines("counts", produced=5, received=5)
    for topic, texts in (
        ("shop_log", [f"line {number}" for number in (1, 2, 3)]),
        ("shop_batch_log", [f"batch {number}" for number in (1, 2, 3, 4, 5)]),
    ):
        assert [line["text"] for line in sample.lines("line", topic=topic)] == texts
    uncommitted = Sample(tmp_path, fresh_kafka.bootstrap_servers, "shop-uncommitted")
    for run in (1, 2):
        # Nothing is committed, so it reads the same again.
        with uncommitted.worker("lines-no-commit") as process:
            process.wait(60)
        assert len(uncommitted.lines("worker", state="ended")) == run
        assert len(uncommitted.lines("length")) == 8 * run
        assert len(uncommitted.lines("line", topic=None)) == 8 * run
