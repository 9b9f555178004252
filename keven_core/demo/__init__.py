"""The main job in one command: `python -m keven_core.demo`."""
