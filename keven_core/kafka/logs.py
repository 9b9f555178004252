"""Log lines that are safe to write and that a flood of bad records can't turn into a flood of lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["RateLimiter", "log_client_line", "one_line"]

_SYSLOG_LEVELS = (
    logging.CRITICAL,
    logging.CRITICAL,
    logging.CRITICAL,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.INFO,
    logging.DEBUG,
)


def one_line(text: object, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters, control characters escaped. Never raises."""
    try:
        plain = str(text)
    except Exception as error:  # an exception class of a service, whose __str__ is broken
        plain = f"<{type(text).__qualname__}, whose __str__ raised {type(error).__qualname__}>"
    if len(plain) <= limit and plain.isprintable():
        return plain
    # Cut first: escaping makes up to ten characters of one.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class RateLimiter:
    """Lets `count` things a `period_s` through, per key, and counts the rest. Owner thread only."""

    def __init__(self, count: int, period_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._period_s = period_s
        self._now = now
        self._windows: dict[str, tuple[float, int, int]] = {}

    def admit(self, key: str) -> int | None:
        """None: keep quiet. Else how many of this key were kept quiet since the last one let through."""
        now = self._now()
        started, used, quiet = self._windows.get(key, (now, 0, 0))
        if now - started >= self._period_s:
            started, used = now, 0
        if used >= self._count:
            self._windows[key] = (started, used, quiet + 1)
            return None
        self._windows[key] = (started, used + 1, 0)
        return quiet


def log_client_line(logger: logging.Logger, level: int, facility: str, text: str) -> None:
    """Pass one of librdkafka's log lines on; `level` is syslog's, 0 to 7."""
    logger.log(_SYSLOG_LEVELS[min(max(level, 0), 7)], "librdkafka %s: %s", facility, one_line(text, 1000))
