"""The engine: requests in, tokens out, over one compiled module."""

from kvpass.engine.engine import Engine

__all__ = ["Engine"]
