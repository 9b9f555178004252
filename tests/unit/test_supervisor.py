"""What a supervisor decides, without processes and without waiting: the tests say what time it is."""

import signal
from typing import Any

import pytest

from keven_core.kafka._supervised import Phase
from keven_core.kafka._supervisor import Deaths, Limits, Look, Place, Step, exit_code, launch_supervised
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.events.server import start_events_receiver_process

MIB = 1 << 20
LIMITS = Limits(hang_s=60, memory_bytes=100 * MIB, stop_s=10)
SERVER: dict[str, Any] = {"settings": Settings(), "max_poll_interval_s": 180}
RECORD = ("t", 0, 5)
OTHER = ("t", 1, 7)


def look(beats: int = 1, *in_hand: tuple[str, int, int], rss_mib: int = 50) -> Look:
    return Look(beats, dict(enumerate(in_hand)), rss_mib * MIB)


def running(now: float = 0.0, limits: Limits = LIMITS) -> Place:
    place = Place(limits, now)
    assert place.waits(now)
    place.started(now)
    assert not place.waits(now)
    return place


# --- death and back-off ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (-9, "it was killed by SIGKILL"),
        (-11, "it was killed by SIGSEGV"),
        (-126, "it was killed by signal 126"),
        (3, "it ended with exit code 3"),
        (0, "it ended with exit code 0"),
    ],
)
def test_a_worker_that_dies_with_a_record_is_started_again_soon(code: int, why: str) -> None:
    place = running()
    end = place.ended(code, Phase.CONSUMING, [RECORD], 1.0)
    assert (end.why, end.died, end.delay_s, end.code) == (why, True, 0.2, None)
    assert not place.waits(1.1)
    assert place.waits(1.2)
    assert not place.gone


def test_delays_double_up_to_half_a_minute_and_start_over_after_a_steady_life() -> None:
    place = running()
    now, delays = 0.0, []
    for _ in range(10):
        end = place.ended(-9, Phase.CONSUMING, [], now)
        delays.append(end.delay_s)
        now += end.delay_s or 0
        place.started(now)
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]
    assert place.ended(-9, Phase.CONSUMING, [], now + 10).delay_s == 0.2


def test_a_record_in_hand_explains_a_death_so_the_next_worker_starts_before_the_session_ends() -> None:
    place = running()
    delays = []
    for _ in range(5):
        delays.append(place.ended(-9, Phase.CONSUMING, [RECORD], 0.0).delay_s)
        place.started(0.0)
    assert delays == [0.2, 0.4, 0.5, 0.5, 0.5]


def test_starts_that_fail_again_and_again_end_everything() -> None:
    place = running()
    for _ in range(7):
        assert place.ended(-11, Phase.STARTING, [], 0.0).code is None
        place.started(0.0)
    end = place.ended(-11, Phase.STARTING, [], 0.0)
    assert end.code == -11
    assert end.why == "it was killed by SIGSEGV, as 8 in a row before they could start"
    assert place.gone


def test_one_start_that_succeeds_starts_that_count_over() -> None:
    place = running()
    for _ in range(7):
        place.ended(1, Phase.STARTING, [], 0.0)
        place.started(0.0)
    place.ended(1, Phase.CONSUMING, [], 0.0)
    place.started(0.0)
    assert place.ended(1, Phase.STARTING, [], 0.0).code is None


def test_an_error_that_would_come_again_ends_everything() -> None:
    place = running()
    end = place.ended(1, Phase.FAILED, [], 5.0)
    assert (end.code, end.delay_s, place.gone, place.code) == (1, None, True, 1)


def test_a_server_that_ends_by_itself_is_not_started_again() -> None:
    place = running()
    end = place.ended(0, Phase.DONE, [], 5.0)
    assert (end.died, end.code, end.delay_s, place.gone, place.code) == (False, None, None, True, 0)


def test_a_worker_that_somebody_else_has_ended_in_order_is_replaced() -> None:
    place = running()
    end = place.ended(0, Phase.CONSUMING, [], 50.0)
    assert (end.died, end.delay_s) == (False, 0.0)
    assert place.waits(50.0)


# --- hanging ---------------------------------------------------------------------------------------------------------


def test_a_record_that_stays_in_hand_too_long_is_the_end_of_its_worker() -> None:
    place = running()
    for now in (0, 30, 60):
        assert place.look(look(now + 1, RECORD), now) is None  # signs of life do not help
    assert place.look(look(99, RECORD), 60.1) is Step.DUMP
    assert place.look(look(99, RECORD), 60.2) is None
    assert place.look(look(99, RECORD), 60.4) is Step.KILL
    assert place.look(look(99, RECORD), 99) is None
    end = place.ended(-9, Phase.CONSUMING, [RECORD], 61.0)
    assert end.died
    assert end.why == "it made no progress for 60 s (KEVEN_WORKER_HANG_MS, max_poll_interval)"


def test_of_several_records_in_hand_the_oldest_counts() -> None:
    place = running()
    assert place.look(Look(1, {0: RECORD}, 0), 0) is None
    assert place.look(Look(1, {0: RECORD, 1: OTHER}, 0), 50) is None
    assert place.look(Look(1, {1: OTHER}, 0), 100) is None
    assert place.look(Look(1, {1: OTHER}, 0), 110.1) is Step.DUMP


def test_another_record_in_the_same_cell_is_progress() -> None:
    place = running()
    for offset in range(10):
        assert place.look(look(1, ("t", 0, offset)), offset * 59.0) is None


def test_without_a_record_signs_of_life_count() -> None:
    place = running()
    for now in range(0, 600, 59):
        assert place.look(look(now + 1), now) is None
    assert place.look(look(591), 650) is None
    assert place.look(look(591), 650.2) is Step.DUMP


def test_the_import_of_a_service_may_take_its_time() -> None:
    place = running()
    assert place.look(look(0), 3600) is None


def test_hanging_may_be_allowed() -> None:
    place = running(limits=Limits(0, 0, 10))
    assert place.look(look(1, RECORD), 0) is None
    assert place.look(look(1, RECORD), 1e6) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_worker_over_its_limit_ends_in_order_and_is_replaced() -> None:
    place = running()
    assert place.look(look(1, rss_mib=100), 20) is None
    assert place.look(look(2, rss_mib=101), 20.1) is Step.TERMINATE
    assert place.look(look(2, rss_mib=101), 20.2) is None
    assert place.why == "it took 101 MiB of memory (KEVEN_WORKER_MEMORY_BYTES=104857600)"
    end = place.ended(0, Phase.CONSUMING, [], 21.0)
    assert (end.died, end.delay_s) == (False, 0.0)


def test_one_that_is_over_at_once_is_not_replaced_in_a_busy_loop() -> None:
    place = running()
    now, delays = 0.0, []
    for _ in range(5):
        assert place.look(look(1, rss_mib=150), now) is Step.TERMINATE
        delays.append(place.ended(0, Phase.CONSUMING, [], now + 1).delay_s)
        now += 60
        place.started(now)
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2]


def test_twice_the_limit_is_the_end_at_once_also_of_one_that_is_ending() -> None:
    assert running().look(look(1, RECORD, rss_mib=201), 0) is Step.KILL
    place = running()
    assert place.look(look(1, RECORD, rss_mib=150), 0) is Step.TERMINATE
    assert place.look(look(1, RECORD, rss_mib=201), 1) is Step.KILL
    end = place.ended(-9, Phase.CONSUMING, [RECORD], 1.1)
    assert end.died
    assert end.why.startswith("it took 201 MiB of memory")


def test_one_that_is_ending_may_not_hang() -> None:
    place = running()
    assert place.look(look(1, RECORD, rss_mib=150), 0) is Step.TERMINATE
    assert place.look(look(1, RECORD, rss_mib=150), 60.1) is Step.DUMP


# --- stopping --------------------------------------------------------------------------------------------------------


def test_stopping_gives_each_worker_its_time() -> None:
    place = running()
    assert place.stop(100.0) is Step.TERMINATE
    assert place.stop(101.0) is None
    assert place.look(look(), 109.9) is None
    assert place.look(look(), 110.0) is Step.KILL
    assert place.look(look(), 111.0) is None
    end = place.ended(-9, Phase.CONSUMING, [RECORD], 110.1)
    why = "it had not ended in time (KEVEN_DRAIN_TIMEOUT_MS, KEVEN_CLOSE_TIMEOUT_MS)"
    assert (end.why, end.died, end.delay_s) == (why, True, None)
    assert place.gone
    assert place.code == -9


def test_a_shorter_time_counts_a_longer_one_does_not() -> None:
    place = running()
    place.stop(100.0, 4.0)
    place.stop(101.0)
    assert place.look(look(), 104.0) is Step.KILL
    place = running()
    place.stop(100.0)
    place.stop(101.0, 0.0)
    assert place.look(look(), 101.0) is Step.KILL


@pytest.mark.parametrize(
    ("code", "phase", "left"),
    [
        (0, Phase.CONSUMING, 0),
        (-signal.SIGTERM, Phase.STARTING, 0),
        (-signal.SIGTERM, Phase.CONSUMING, -signal.SIGTERM),
        (1, Phase.CONSUMING, 1),
    ],
)
def test_how_a_worker_ends_that_was_told_to(code: int, phase: Phase, left: int) -> None:
    place = running()
    place.stop(1.0)
    assert place.ended(code, phase, [], 2.0).code is None
    assert (place.gone, place.code) == (True, left)


def test_the_exit_code_of_all() -> None:
    assert exit_code([]) == exit_code([0, 0]) == 0
    assert exit_code([0, 3, 1]) == 3
    assert exit_code([0, -9, 3]) == 1


def test_one_that_waits_for_its_start_is_not_started_any_more() -> None:
    place = running()
    place.ended(-9, Phase.CONSUMING, [], 1.0)
    assert place.stop(1.1) is None
    assert place.gone
    assert not place.waits(99)


def test_one_that_is_being_replaced_is_not_told_twice() -> None:
    place = running()
    assert place.look(look(1, rss_mib=150), 0) is Step.TERMINATE
    assert place.stop(1.0) is None
    assert place.look(look(1, rss_mib=150), 11.0) is Step.KILL


# --- suspects --------------------------------------------------------------------------------------------------------


def test_after_three_deaths_a_record_is_condemned() -> None:
    deaths = Deaths(3600)
    assert deaths.note([RECORD], "it hung", 0) == {RECORD: 1}
    assert deaths.note([RECORD, OTHER], "it died", 1) == {RECORD: 2, OTHER: 1}
    assert deaths.suspects(2) == [(*RECORD, 2, False, "it died"), (*OTHER, 1, False, "it died")]
    assert deaths.note([RECORD], "it died again", 2) == {RECORD: 3}
    assert deaths.suspects(3) == [(*OTHER, 1, False, "it died"), (*RECORD, 3, True, "it died again")]


def test_deaths_are_forgotten_in_time() -> None:
    deaths = Deaths(3600)
    deaths.note([RECORD], "", 0)
    deaths.note([OTHER], "", 3000)
    assert [entry[:3] for entry in deaths.suspects(3599)] == [RECORD, OTHER]
    assert [entry[:3] for entry in deaths.suspects(3600)] == [OTHER]
    assert deaths.note([RECORD], "", 3600) == {RECORD: 1}


def test_too_many_condemned_records_are_not_their_own_fault() -> None:
    deaths = Deaths(3600)
    for offset in range(20):
        assert not deaths.too_many()
        for _ in range(3):
            deaths.note([("t", 0, offset)], "", 0)
    assert deaths.too_many()
    deaths.suspects(3600)
    assert not deaths.too_many()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [0, -1, 1025, 1.5, True, "2"])
def test_how_many_processes_there_may_be(processes: object) -> None:
    with pytest.raises(ConfigurationError, match=r"processes=.*: 1 to 1024 are allowed"):
        launch_supervised("s", print, {}, processes=processes, **SERVER)  # type: ignore[arg-type]


def test_several_processes_need_a_supervisor() -> None:
    with pytest.raises(ConfigurationError, match=r"supervised=False goes with one process only, not with processes=2"):
        start_events_receiver_process("s", processes=2, supervised=False)


def test_a_wrong_setting_is_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEVEN_WORKER_HANG_MS", "soon")
    with pytest.raises(ConfigurationError, match="KEVEN_WORKER_HANG_MS='soon' is not a whole number"):
        start_events_receiver_process("s", processes=2)
