"""`DelayedCommandsAndEvents`: where it is imported from; see keven_core.kafka.publishing."""

from keven_core.kafka.publishing import DelayedCommandsAndEvents

__all__ = ["DelayedCommandsAndEvents"]
