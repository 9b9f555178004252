"""The sample service's own tests, which need no broker: sample_service/offline.py says what each has to observe."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from sample import Line, Sample
from sample_service.names import ShopEvents


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return Sample(tmp_path, "127.0.0.1:1")


def observed(sample: Sample, scenario: str) -> list[Line]:
    """Its lines, but for those of hooks, without the process id."""
    sample.run("offline", scenario)
    lines = [line for line in sample.lines() if line["what"] != "hook"]
    for line in lines:
        del line["pid"]
    return lines


def handled(handler: str, name: str, kind: str) -> dict[str, Any]:
    return {"what": "handled", "handler": handler, "name": name, "type": kind}


def test_registry(sample: Sample) -> None:
    registry, *rest = observed(sample, "registry")
    assert registry.pop("printed") >= 1
    assert registry == {
        "what": "registry",
        "events": sorted(name.value.lower() for name in ShopEvents),
        "placed": 2,
        "unknown": 0,
        "placed_classes": 2,
        "place_order_classes": 1,
        "handler_is_class": True,
    }
    assert rest == [
        handled("print_event", "PRINT_EVENT", "Notice"),
        handled("test_event", "TEST", "Notice"),
        {"what": "no io_server"},
    ]


def test_publishing(sample: Sample) -> None:
    def published(name: str, kind: str) -> Line:
        return {"what": "published", "name": name, "type": kind}

    assert observed(sample, "publishing") == [
        {"what": "cached"},
        published("ORDER_PLACED", "OrderPlaced"),
        published("ORDER_PLACED", "OrderPlaced"),
        {"what": "flushed cache"},
        published("PING", "Ping"),
        {"what": "committing again"},
        published("STOCK_CHANGED", "StockChanged"),
        {"what": "in block"},
        published("PING", "Ping"),
        {"what": "end"},
    ]


def test_a_handlers_events_go_out_after_it(sample: Sample) -> None:
    lines = observed(sample, "delayed-handler")
    what = [line.get("handler", line["what"]) for line in lines]
    assert sorted(what) == ["count_order", "published", "send_invoice"]
    assert what.index("published") > what.index("send_invoice")
    assert [line["name"] for line in lines if line["what"] == "published"] == ["INVOICE_SENT"]


def test_replay(sample: Sample) -> None:
    assert observed(sample, "replay") == [
        {"what": "logged", "topic": "keven_events_order_placed", "is_bytes": True},
        {"what": "logged", "topic": "keven_events_payment_bounced", "is_bytes": True},
        {"what": "logged", "topic": "keven_events", "is_bytes": True},
        {"what": "replayed", "name": "ORDER_PLACED", "type": "OrderPlaced", "value": 41},
        {"what": "replayed", "name": "PAYMENT_BOUNCED", "type": "PaymentBounced", "value": "p9"},
        {"what": "replayed", "name": "PING", "type": "Ping", "value": None},
        {"what": "ran", "type": "OrderPlaced"},
    ]


def test_commands(sample: Sample) -> None:
    assert observed(sample, "commands") == [
        {"what": "cached"},
        {"what": "logged", "topic": "keven_commands_place_order", "is_bytes": True},
        {"what": "logged", "topic": "keven_commands_cancel_order", "is_bytes": True},
        {"what": "parsed", "type": "PlaceOrder", "same_uuid": True, "order_id": 51},
        {"what": "replayed", "type": "PlaceOrder"},
        {"what": "replayed", "type": "CancelOrder"},
        {
            "what": "reports",
            "started": "CMD_PLACE_ORDER_STARTED",
            "errored": "CMD_PLACE_ORDER_ERRORED",
            "older": "CMD_PLACE_ORDER_ERROR",
            "names": ["CMD_PLACE_ORDER_COMPLETED", "CMD_PLACE_ORDER_COMPLETE"],
        },
    ]


def test_logs(sample: Sample) -> None:
    def produced(topic: str, value: str) -> Line:
        return {"what": "produced", "topic": topic, "value": value}

    flushed = {"what": "flushed"}
    assert observed(sample, "logs") == [
        produced("shop_log", "one"),
        flushed,
        produced("shop_other", "two"),
        flushed,
        produced("shop_batch_log", "three"),
        produced("shop_batch_log", "four"),
        flushed,
        {"what": "counts", "produced": 2, "received": 2},
    ]
