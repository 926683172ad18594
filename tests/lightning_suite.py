"""Runs Lightning's own tests with this strategy in the place of the one for a single CPU, in one process.

::

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning checkout
    pip install pytest pytest-timeout pytest-rerunfailures cloudpickle scikit-learn tensorboard jsonargparse
    python tests/lightning_suite.py checkout                  # what tests/lightning_suite.md tells of
    python tests/lightning_suite.py checkout loops callbacks  # parts of tests/tests_pytorch
    python tests/lightning_suite.py checkout --stock loops    # Lightning as it is, to compare

Take the tag nearest to the installed version. This module is also the plugin of pytest that replaces the strategy.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = (
    "callbacks",
    "checkpointing",
    "core",
    "loops",
    "models/test_hooks.py",
    "models/test_restore.py",
    "trainer/connectors",
    "trainer/flags",
    "trainer/logging_",
    "trainer/optimization",
    "trainer/properties",
    "trainer/test_config_validator.py",
    "trainer/test_dataloaders.py",
    "trainer/test_states.py",
    "trainer/test_trainer.py",
    "tuner",
)
NOT_APPLICABLE = (
    "trainer/connectors/test_accelerator_connector.py",  # asserts which strategy Lightning chooses
    "checkpointing/test_legacy_checkpoints.py",  # needs files that are downloaded
)


def pytest_configure(config: pytest.Config) -> None:
    """Let Lightning choose this strategy wherever it would choose the one for a single CPU."""
    if os.environ.get("LWPM_SUITE") == "stock":
        return
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    from lightning_lwpm import LWPMStrategy

    choose = _AcceleratorConnector._choose_strategy

    def choose_ours(connector: _AcceleratorConnector) -> object:
        chosen = choose(connector)
        if type(chosen) is SingleDeviceStrategy and chosen.root_device.type == "cpu":
            return LWPMStrategy()
        return chosen

    _AcceleratorConnector._choose_strategy = choose_ours


def main() -> int:
    """Run the tests of a checkout."""
    checkout, *wanted = sys.argv[1:]
    stock = "--stock" in wanted
    paths = [path for path in wanted if path != "--stock"] or list(PARTS)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "LWPM_SUITE": "stock" if stock else "", "LWPM_CACHE": "off"}
    options = ["-p", Path(__file__).stem, "-p", "no:xdist", "-q", "--tb=short", "--show-capture=no", "--timeout=120"]
    ignored = [f"--ignore={name}" for name in NOT_APPLICABLE]
    command = [sys.executable, "-m", "pytest", *options, "-o", "addopts=", *ignored, *paths]
    return subprocess.call(command, cwd=Path(checkout, "tests", "tests_pytorch"), env=environment)


if __name__ == "__main__":
    sys.exit(main())
