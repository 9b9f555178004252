"""Batch handlers: one call for a list of events, whatever else handles the same event."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keven_core.kafka._calls import Verdict, check_done, finished, is_async
from keven_core.kafka.errors import UsageError
from keven_core.kafka.outcomes import BatchError, wrong_outcomes
from keven_core.kafka.publishing import HandlerOutbox, begun_share

if TYPE_CHECKING:
    from keven_core._native.dispatch import Route

__all__ = ["BatchPart", "cause_of", "compose_batch", "one_of_a_batch", "outcomes_of", "single_call"]

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class BatchPart:
    """A handler of an event that has a batch handler: of the whole list, or of one event after the other."""

    name: str
    call: Call
    takes_list: bool


def outcomes_of(call: Call, result: Any, count: int) -> list[Exception | None]:
    """What a batch handler has returned, as one entry for each event. Raises UsageError, or the outcome of them all."""
    if result is None:
        return [None] * count
    if not isinstance(result, (list, tuple)):
        check_done(call, result)
    wrong = wrong_outcomes(getattr(call, "__qualname__", repr(call)), result, count)
    if wrong is not None:
        raise wrong
    return list(result)


def single_call(route: Route) -> Call:
    """What handles one event of a route, also of a batch handler's."""
    return one_of_a_batch(route.call) if route.batch_size else route.call


def one_of_a_batch(call: Call) -> Call:
    """A batch handler's call as one that takes a single event and raises its outcome."""

    def given(result: Any) -> None:
        (outcome,) = outcomes_of(call, result, 1)
        if outcome is not None:
            raise outcome

    if is_async(call):

        async def call_async(event: Any) -> None:
            try:
                given(await finished(call([event])))
            except BatchError as error:
                raise cause_of(error) from None

        return call_async

    def call_one(event: Any) -> None:
        try:
            given(call([event]))
        except BatchError as error:
            raise cause_of(error) from None

    return call_one


def compose_batch(parts: list[BatchPart], pre: list[Call], post: list[Call]) -> Call:
    """One call for a list of events: pre-hooks, each handler in order, post-hooks.

    It returns None, or a list with None or what failed for each event. As with single events every handler runs, but
    not for an event whose pre-hook has raised. The result is async when any part is.
    """
    if len(parts) == 1 and not pre and not post:
        return parts[0].call
    if any(is_async(call) for call in (*(part.call for part in parts), *pre, *post)):

        async def call_async(events: list[Any]) -> list[Exception | None]:
            run = _Run(_steps(parts, pre, post, events))
            while (step := run.next_step()) is not None:
                call, argument = step
                try:
                    run.answer = call(argument)
                    if isinstance(run.answer, Awaitable):
                        run.answer = await finished(run.answer)
                except Exception as error:
                    run.failure = error
            return run.outcomes

        return call_async

    def call_all(events: list[Any]) -> list[Exception | None]:
        run = _Run(_steps(parts, pre, post, events))
        while (step := run.next_step()) is not None:
            call, argument = step
            try:
                run.answer = call(argument)
            except Exception as error:
                run.failure = error
        return run.outcomes

    return call_all


_Steps = Generator[tuple[Call, Any], Any, list[Exception | None]]


class _Run:
    """Where the steps stand: the result of the last call is told to them, then they say the next one."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps
        self.answer: Any = None
        self.failure: Exception | None = None
        self.outcomes: list[Exception | None] = []

    def next_step(self) -> tuple[Call, Any] | None:
        """The call to make and its argument; None: there is none, and `outcomes` says what became of each event."""
        answer, failure = self.answer, self.failure
        self.answer = self.failure = None
        try:
            return self._steps.send(answer) if failure is None else self._steps.throw(failure)
        except StopIteration as end:
            self.outcomes = end.value
            return None


def _steps(parts: list[BatchPart], pre: list[Call], post: list[Call], events: list[Any]) -> _Steps:
    """The calls to make, each yielded as (call, argument) and told its result; then what became of each event."""
    verdicts = [Verdict(len(parts)) for _ in events]
    outbox, published = begun_share()
    positions = []
    for position, event in enumerate(events):
        try:
            for hook in pre:
                check_done(hook, (yield hook, event))
        except Exception as error:
            verdicts[position].hook_failed(error)
        else:
            positions.append(position)
    for part in parts:
        if part.takes_list:
            yield from _list_steps(part, positions, events, verdicts, outbox)
            continue
        for position in positions:
            before = len(published)
            try:
                check_done(part.call, (yield part.call, events[position]))
                if outbox is not None and len(published) > before:
                    outbox.send()
            except Exception as error:
                if outbox is not None:
                    outbox.drop(before)
                verdicts[position].handler_failed(part.name, error)
    for position, event in enumerate(events):
        for hook in post:
            try:
                check_done(hook, (yield hook, event))
            except Exception as error:
                verdicts[position].hook_failed(error)
    return [verdict.failure() for verdict in verdicts]


def _list_steps(
    part: BatchPart,
    positions: list[int],
    events: list[Any],
    verdicts: list[Verdict],
    outbox: HandlerOutbox | None,
) -> Generator[tuple[Call, Any], Any, None]:
    """A batch handler among others: after a BatchError it is called again at once, with the events behind."""
    rest = positions
    while rest:
        now, rest = rest, []
        try:
            result = yield part.call, [events[position] for position in now]
            found = outcomes_of(part.call, result, len(now))
        except BatchError as error:
            if not 0 <= error.index < len(now):
                wrong = UsageError(f"{part.name} raised BatchError({error.index}) for {len(now)} event(s)")
                found = [wrong] * len(now)
            else:
                found = [None] * error.index + [cause_of(error)]
                rest = now[error.index + 1 :]
        except Exception as error:
            found = [error] * len(now)
        if outbox is not None and outbox.messages:
            if None in found:
                try:
                    outbox.send()
                except Exception as error:
                    found = [error] * len(now)
            outbox.drop()
        for position, outcome in zip(now, found, strict=False):
            if outcome is not None:
                verdicts[position].handler_failed(part.name, outcome)


def cause_of(error: BatchError) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error
