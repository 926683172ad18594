"""Fixtures for tests that run Lightning."""

from training.runs import runs

__all__ = ["runs"]
