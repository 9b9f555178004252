"""Writes docs/settings.md from the settings' own metadata: `python tools/settings_doc.py [--check]`.

--check writes nothing and ends with 1 when the file is not up to date.
"""

import sys
from pathlib import Path
from typing import Any

from keven_core.kafka.config import ALLOWED_OPTIONS, describe_settings

TARGET = Path(__file__).parents[1] / "docs" / "settings.md"

HEAD = """\
# Settings

Made by `python tools/settings_doc.py` from `keven_core/kafka/config.py`: change it there.

Each setting is an environment variable and a field of `Settings`. A server or logger that is given no `settings=` reads
the environment when it starts (a logger: at its first message); `Settings.from_env(batch_size=500)` reads it with
changes, `Settings(...)` does not read it at all. An empty variable counts as not set. A wrong value is a
`ConfigurationError` that names the variable, the value and what is allowed, before anything connects.

"""

SECTIONS = [
    (
        "Consuming",
        (
            "kafka_address",
            "batch_",
            "prefetch_",
            "max_payload_",
            "max_in_flight",
            "workers",
            "commit_",
            "drain_",
            "close_",
            "auto_offset_",
        ),
    ),
    ("Failed records", ("fatal_", "retryable_", "dead_letter")),
    (
        "Publishing",
        (
            "codec",
            "max_message_",
            "linger_",
            "log_",
            "spill_",
            "large_attribute_",
            "compression",
            "acks",
            "idempotence",
            "create_topics",
        ),
    ),
    ("Supervised processes", ("worker_",)),
    ("Security", ("security_", "sasl_", "ssl_", "allow_insecure")),
    ("Everything else", ("strict", "rdkafka_options")),
]

PUBLISHING = """\
Loggers heed all of these; the producer of retry and dead-letter copies has fixed values ("Not settings", below).
`KafkaLogger` sends each message at once, whatever `KEVEN_LINGER_MS` says. `KEVEN_ACKS=1` or `0` turns idempotence off,
with a warning unless `KEVEN_IDEMPOTENCE=false` says the same; `KEVEN_IDEMPOTENCE=true` beside it is an error.

"""

SECURITY = """\
Passwords appear in no repr, log line or error message. `sasl_mechanism="OAUTHBEARER"` takes its token from a callback
that is given in code: `Settings(oauth_token=callback, ...)`, called with the value of `sasl.oauthbearer.config`; it
returns (token, expiry in seconds since the epoch, principal).

"""

REST = """\
Further librdkafka properties, in the environment (`KEVEN_RDKAFKA_OPTIONS=fetch.min.bytes=100,debug=cgrp`) or in code
(`Settings(rdkafka_options={...})`). They win over the other settings; those that do not concern a producer are left out
there, and `partitioner` everywhere but in loggers, where `murmur2_random` is the default: a key gets the partition that
Java services give it.

"""

FIXED = """\
## Not settings

These librdkafka properties have one value, for the reason given:

| Property | Value | Why |
|---|---|---|
| `check.crcs` | `true` | a damaged message would reach the decoder |
| `enable.metrics.push` | `false` | metrics would be pushed to the broker without having been asked for (KIP-714) |
| `enable.auto.offset.store` | `false` | an offset is stored when all handlers of its record have returned |
| `allow.auto.create.topics` | `false` | a wrong name is an error instead of a new topic |
| `topic.metadata.propagation.max.ms` | `5000` | after that time the messages for a topic that is missing fail |
| `queue.buffering.max.messages` | `0` (no bound) | loggers share a producer, and one that fills its own bounds must \
not stop the others: see `KEVEN_LOG_QUEUE_MESSAGES` |
| `queue.buffering.max.kbytes` | `2147483647` | the same: see `KEVEN_LOG_QUEUE_BYTES` |

These have one value for retry and dead-letter copies: a record counts as handled once its copy is written, so the copy
must not get lost. Loggers have settings for them.

| Property | Value | Why |
|---|---|---|
| `acks` | `all` | a copy counts when every in-sync replica has it |
| `enable.idempotence` | `true` | a repeated send makes no duplicate and keeps the order |
| `partitioner` | `murmur2_random` | a copy gets the partition that Java services give its key |
| `compression.type` | `lz4` | cheap, and every consumer reads it |
| `linger.ms` | `5` | copies of one batch go out together |
| `message.max.bytes` | `1000000000` | what was accepted where it comes from has to fit |

Under the new group protocol (`group.protocol=consumer`, KIP-848) the broker decides on session timeout, heartbeat
interval and assignment strategy, so these are left out.
"""


def _shown(value: Any) -> str:
    if value is None or value == "" or (not isinstance(value, (int, str)) and not value):
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _allowed(setting: dict[str, Any]) -> str:
    if setting["choices"]:
        return " \\| ".join(f"`{choice}`" for choice in setting["choices"])
    if setting["low"] is not None:
        return f"{setting['low']} to {setting['high']}"
    return ""


def _table(settings: list[dict[str, Any]]) -> str:
    lines = [
        "| Variable | Field | Default | Unit | Allowed | librdkafka property | Effect |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        unit = setting["unit"].replace("|", "\\|")
        cells = [
            f"`{setting['env']}`",
            f"`{setting['field']}`",
            _shown(setting["default"]),
            unit,
            _allowed(setting),
            f"`{setting['kafka']}`" if setting["kafka"] else "",
            setting["effect"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n"


def settings_document() -> str:
    """The text of docs/settings.md."""
    left = describe_settings()
    text = HEAD
    for title, prefixes in SECTIONS:
        chosen = [setting for setting in left if setting["field"].startswith(prefixes)]
        left = [setting for setting in left if setting not in chosen]
        text += f"## {title}\n\n"
        text += PUBLISHING if title == "Publishing" else ""
        text += SECURITY if title == "Security" else ""
        text += REST if title == "Everything else" else ""
        text += _table(chosen)
    if left:
        raise SystemExit(f"no section of tools/settings_doc.py takes {', '.join(entry['field'] for entry in left)}")
    text += "Allowed are:\n\n" + "\n".join(f"- `{key}`" for key in sorted(ALLOWED_OPTIONS)) + "\n\n"
    return text + FIXED


def main() -> None:
    """Write the file, or check it."""
    text = settings_document()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            raise SystemExit(f"{TARGET} is not up to date: run `python tools/settings_doc.py`")
    else:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
