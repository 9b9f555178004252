"""Metaclasses of the handlers."""
