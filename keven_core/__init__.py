"""keven_core: Kafka in, handlers out.

The Kafka part is `keven_core.kafka`. Importing this package loads nothing else.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
