"""Fixtures for all tests."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests: pool, harness, models

from pool import Pool

# measured costs are kept for the session, and apart from the user's; workers inherit the folder
_costs = tempfile.TemporaryDirectory(prefix="lwpm-costs-")
os.environ["LWPM_CACHE"] = _costs.name


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The worker processes of this session."""
    workers = Pool()
    yield workers
    workers.close()
