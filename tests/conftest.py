"""Fixtures for all tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests: pool, harness, models

from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The worker processes of this session."""
    workers = Pool()
    yield workers
    workers.close()
