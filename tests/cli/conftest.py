"""The configuration of a tiny run as a fixture."""

from testing.tiny_run import values

__all__ = ["values"]
