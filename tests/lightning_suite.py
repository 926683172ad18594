"""Runs Lightning's own tests with this strategy in the place of the one for a single CPU, in one process.

::

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning checkout
    pip install pytest pytest-timeout pytest-rerunfailures cloudpickle scikit-learn tensorboard jsonargparse
    python tests/lightning_suite.py checkout                  # what tests/lightning_suite.md tells of
    python tests/lightning_suite.py checkout loops callbacks  # parts of tests/tests_pytorch
    python tests/lightning_suite.py checkout --two            # two stages, in the tests that want `ddp_spawn` on CPUs
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


TWO = (
    "callbacks/test_early_stopping.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_weight_averaging.py",
    "profilers/test_profiler.py",
    "strategies/launchers/test_multiprocessing.py",
    "strategies/test_ddp_integration.py",
    "trainer/connectors/test_data_connector.py",
    "trainer/flags/test_overfit_batches.py",
    "trainer/logging_/test_distributed_logging.py",
    "trainer/logging_/test_train_loop_logging.py",
    "trainer/optimization/test_manual_optimization.py",
    "trainer/properties/test_get_model.py",
    "trainer/test_dataloaders.py",
    "trainer/test_trainer.py",
)

SLURM = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
"""What each job of SLURM has; tests that pretend to be one have not, and the strategy for a single CPU does not ask."""

_in_two: dict[str, list[str]] = {}  # by test that has wanted `ddp_spawn`, what became of it


def pytest_configure(config: pytest.Config) -> None:
    """Let Lightning choose this strategy wherever it would choose the one for a single CPU, or `ddp_spawn` on CPUs."""
    if os.environ.get("LWPM_SUITE") == "stock":
        return
    if os.environ.get("LWPM_SUITE") == "two":
        _replace_spawned()
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


def _replace_spawned() -> None:
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    import lightning_lwpm  # noqa: F401  # registers the names

    init = _AcceleratorConnector.__init__

    def init_ours(self: object, *args: object, strategy: object = "auto", **kwargs: object) -> None:
        if strategy == "ddp_spawn" and kwargs.get("accelerator") in ("cpu", "auto"):
            strategy = "lwpm_spawn"
            _in_two.setdefault(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0], [])
        init(self, *args, strategy=strategy, **kwargs)  # type: ignore[arg-type, misc]

    _AcceleratorConnector.__init__ = init_ours  # type: ignore[assignment, method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what becomes of tests that have wanted `ddp_spawn`."""
    if report.nodeid in _in_two and (report.when == "call" or report.failed):
        _in_two[report.nodeid].append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List them: only these say something of two stages."""
    for test, outcomes in _in_two.items():
        terminalreporter.write_line(f"two stages: {test}: {', '.join(outcomes)}")


def main() -> int:
    """Run the tests of a checkout."""
    checkout, *wanted = sys.argv[1:]
    mode = next((option for option in ("stock", "two") if f"--{option}" in wanted), "")
    paths = [path for path in wanted if not path.startswith("--")] or list(TWO if mode == "two" else PARTS)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "LWPM_SUITE": mode, "LWPM_CACHE": "off", **SLURM}
    options = ["-p", Path(__file__).stem, "-p", "no:xdist", "-q", "--tb=short", "--show-capture=no", "--timeout=120"]
    ignored = [f"--ignore={name}" for name in NOT_APPLICABLE]
    if not mode:
        options += ["-k", "not spawn and not ddp"]  # of several processes: they take Lightning's own strategies
    command = [sys.executable, "-m", "pytest", *options, "-o", "addopts=", *ignored, *paths]
    return subprocess.call(command, cwd=Path(checkout, "tests", "tests_pytorch"), env=environment)


if __name__ == "__main__":
    sys.exit(main())
