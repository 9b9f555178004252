"""The parts of `keven_core.testing.real_kafka`: finding Java and the jars, settings, processes, Docker.

Private: use `keven_core.testing.real_kafka`.
"""
