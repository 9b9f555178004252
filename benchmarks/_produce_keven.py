"""keven_core's loggers as contestants of benchmarks/produce.py, as a service uses them."""

from __future__ import annotations

from typing import Any

from benchmarks._meter import peak_rss_mb, rss_mb
from benchmarks._produce import WARM_UP, Window, keep_in_flight, payloads, run_log, send_large, warm_up
from keven_core.kafka.config import Settings
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

_TIMEOUT_S = 120
# How often run_soak() looks at the memory.
_SAMPLES = 100
_SIZE = 254
# Bytes from one message of run_soak() to the next: distinct, and compressible enough for any disk.
_STRIDE = 16


def _settings(spec: dict[str, Any]) -> Settings:
    return Settings(kafka_address=spec["address"], **spec["settings"])


def _batch_logger(spec: dict[str, Any]) -> KafkaBatchLogger:
    logger = KafkaBatchLogger(topic=spec["topic"], timeout=_TIMEOUT_S, settings=_settings(spec))
    warm_up(logger.log, logger.flush)
    return logger


def acknowledged_logger(spec: dict[str, Any]) -> KafkaLogger:
    logger = KafkaLogger(topic=spec["topic"], timeout=_TIMEOUT_S, settings=_settings(spec))
    warm_up(logger.log, lambda: None)
    return logger


def _counts(logger: KafkaBatchLogger) -> dict[str, int]:
    return {"sent": logger.produced_count, "delivered": logger.received_count}


def run_cost(spec: dict[str, Any]) -> dict[str, Any]:
    """CPU of the thread that calls log(), in runs that fit the queue."""
    values = payloads(spec)
    with _batch_logger(spec) as logger:

        def send(part: list[bytes]) -> None:
            log = logger.log
            for data in part:
                log(data)

        return {**run_log(send, logger.flush, values, spec["run"]), **_counts(logger)}


def run_throughput(spec: dict[str, Any]) -> dict[str, Any]:
    """From the first log() to the last acknowledgement."""
    values = payloads(spec)
    window = Window(spec)
    with _batch_logger(spec) as logger:
        log = logger.log
        window.start()
        for data in values:
            log(data)
        logger.flush()
        window.stop()
        return {**window.result(len(values)), **_counts(logger)}


def run_large(spec: dict[str, Any]) -> dict[str, Any]:
    """Memory that messages of 1 MB take."""
    with _batch_logger(spec) as logger:
        growth = send_large(logger.log, lambda: logger.pending_count, spec)
        logger.flush()
        return {**growth.result(), **_counts(logger)}


def run_alog(spec: dict[str, Any]) -> dict[str, Any]:
    """Messages from many tasks on uvloop, each acknowledged before its task sends the next one."""
    import uvloop

    values = payloads(spec)
    window = Window(spec)
    logger = acknowledged_logger(spec)

    async def main() -> None:
        await keep_in_flight(logger.alog, values[: len(values) // 20], spec["tasks"])
        window.start()
        await keep_in_flight(logger.alog, values, spec["tasks"])
        window.stop()

    uvloop.run(main())
    logger.close()
    return {**window.result(len(values)), "sent": WARM_UP + len(values) // 20 + len(values)}


def run_soak(spec: dict[str, Any]) -> dict[str, Any]:
    """Send `count` messages, each a new object, and note the memory after each hundredth, when all have arrived.

    How many are under way changes from moment to moment, and 100 000 of them take 50 MB.
    """
    from keven_core._native.library import live_objects
    from keven_core.kafka._producers import close_producers

    blob = b"".join(payloads(spec))
    step = spec["count"] // _SAMPLES
    places = len(blob) // _STRIDE - _SIZE
    memory = []
    with _batch_logger(spec) as logger:
        log = logger.log
        for number in range(_SAMPLES):
            for index in range(number * step, (number + 1) * step):
                at = index % places * _STRIDE
                log(blob[at : at + _SIZE])
            logger.flush()
            memory.append(rss_mb())
        counts = _counts(logger)
    close_producers(spec["address"])
    return {**counts, "memory": memory, "peak_rss_mb": peak_rss_mb(), "live_objects": live_objects()}
