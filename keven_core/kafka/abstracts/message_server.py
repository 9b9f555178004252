"""`MessageReceiverServer`: connects an I/O server with the runner that processes its messages."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from keven_core.kafka.abstracts.consumer_server import run_in_loop
from keven_core.kafka.errors import UsageError

__all__ = ["MessageReceiverServer"]


class MessageReceiverServer:
    """Gives `runner` to `io_server` and starts it.

    An io_server is any object with add_runner(runner), client_id and `async run_server()`: a KafkaConsumerServer or a
    service's own. Start it with start_sync() or `await start()`, or embed it with `with` / `async with` where the
    io_server can be embedded.
    """

    def __init__(self, runner: Any, io_server: Any = None) -> None:
        self.runner = runner
        self.io_server: Any = None
        if io_server is not None:
            self.assign_io_server(io_server)

    def assign_io_server(self, io_server: Any) -> None:
        """Connect the I/O server; before the start."""
        io_server.add_runner(self.runner)
        self.io_server = io_server

    def _required(self) -> Any:
        if self.io_server is None:
            raise ValueError("the server has no io_server: give one, or call assign_io_server() before the start")
        return self.io_server

    async def start(self) -> None:
        """Run the I/O server in this event loop until it ends. Raises ValueError without one."""
        await self._required().run_server()

    def start_sync(self) -> None:
        """Run the I/O server in this thread until it ends; blocks. Raises ValueError without one."""
        io_server = self._required()
        if hasattr(io_server, "start_sync"):
            io_server.start_sync()
        else:
            run_in_loop(io_server.run_server())

    def stop(self) -> None:
        """Ask the I/O server to end in order; from any thread. Raises UsageError when it has no stop or terminate."""
        io_server = self._required()
        for name in ("stop", "terminate"):
            if hasattr(io_server, name):
                getattr(io_server, name)()
                return
        raise UsageError(f"the io_server {type(io_server).__qualname__} has neither stop() nor terminate()")

    def __enter__(self) -> MessageReceiverServer:
        """Start the I/O server in a thread."""
        self._required().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and wait for it."""
        self.io_server.__exit__(kind, error, trace)

    async def __aenter__(self) -> MessageReceiverServer:
        """Start the I/O server in a task of this loop."""
        await self._required().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and wait for it."""
        await self.io_server.__aexit__(kind, error, trace)
