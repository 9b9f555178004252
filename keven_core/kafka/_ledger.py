"""Whether what a server has counted adds up, and goes with its offsets. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["discrepancies"]

Partition = tuple[str, int]


def discrepancies(
    ledger: Mapping[Partition, Mapping[str, int]], offsets: Mapping[Partition, tuple[int, int, int]]
) -> list[str]:
    """What does not add up at the end of a run in which everything that was begun was finished; usually nothing.

    Arguments:
        ledger: counts by partition; `received` is the sum of the others then.
        offsets: (position, stored, committed) of the partitions that are still assigned; -1: none yet.
    """
    found = []
    for (topic, partition), counts in ledger.items():
        outcomes = {name: count for name, count in counts.items() if name not in ("received", "in_flight")}
        if counts["received"] != sum(outcomes.values()) or counts["in_flight"] != 0:
            listed = ", ".join(f"{count} {name}" for name, count in outcomes.items() if count)
            found.append(
                f"{topic} [{partition}]: {counts['received']} records were received, but {sum(outcomes.values())} are "
                f"accounted for ({listed or 'none'})"
            )
    for (topic, partition), (position, stored, _) in offsets.items():
        if stored > position:
            found.append(
                f"{topic} [{partition}]: the offset {stored} was stored, but records are handled up to {position} only "
                f"(if the topic was cut or made anew meanwhile, set the group's offset, or records may be passed over)"
            )
    return found
