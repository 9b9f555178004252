"""A small shop, written as its authors wrote it against the original ``keven_core.kafka``.

Nothing here knows of any later feature. A test that runs it unchanged shows that the package is a drop-in.

Run with the folder above this package on ``PYTHONPATH``::

    KAFKA=localhost:9092 SAMPLE_SERVICE_RECORD=/tmp/seen.jsonl python -m sample_service.worker events
    KAFKA=localhost:9092 SAMPLE_SERVICE_RECORD=/tmp/sent.jsonl python -m sample_service.drive orders

Environment:

- ``KAFKA``: the broker; read by the package, never by this service.
- ``SAMPLE_SERVICE_RECORD``: file to which every observation is appended, one JSON object a line (`record`).
- ``SAMPLE_SERVICE_NAME``: server name, thus client and group id of a worker; default ``shop``.
- ``SAMPLE_SERVICE_SECONDS``: how long a worker waits without a message, or lets a child process run; default 10.

Where to read what has to be observed: `worker` (which launcher), `drive` (what is sent and what comes of it, scenario
by scenario), `offline` (what needs no broker), and the handlers' own modules (the fields of their lines).
"""
