"""Makes `trainer=lwpm` and `+trainer/strategy=lwpm` or `=lwpm_async` choices in any Hydra project of this environment.

Every Hydra program imports this, so it stays light: no torch, no Lightning. The files under `conf/` are links to those
of the repository's `conf/`, of which the rest belongs to the examples.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["LWPMConf", "LWPMSearchPath"]


@dataclass
class LWPMConf:
    """The options of ``lightning_lwpm.LWPMStrategy``, which says what they mean."""

    _target_: str = "lightning_lwpm.LWPMStrategy"
    _convert_: str = "all"  # lists arrive as lists
    num_microbatches: int | str = "auto"
    schedule: str = "auto"
    partition: Any = "auto"
    costs: str = "measured"
    device_memory: float | str | None = None
    repartition_every_n_epochs: int = 0
    virtual_stages: int | str = "auto"
    activation_checkpointing: str = "none"
    data_parallel_size: int = 1
    process_group_backend: str | None = None
    timeout: Any = None  # {_target_: datetime.timedelta, minutes: 10}
    start_method: str = "popen"
    patience: float = 30.0
    timeline: str | None = None
    log_bubble: bool = False
    async_checkpoint: bool = False
    state_dict_type: str = "full"
    weights_after_run: str = "all_ranks"
    deterministic_rng: bool = False
    deferred_batch_norm: bool = False
    staleness_correction: str = "look_ahead+discount"
    max_staleness: int | None = None
    exact_warmup_steps: int = 0
    exact_final_steps: int = 0
    drain_every_n_steps: int = 0


class LWPMSearchPath(SearchPathPlugin):
    """Adds the configurations of this library after those of the project, which win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See :class:`SearchPathPlugin`."""
        search_path.append(provider="lightning-lwpm", path=f"pkg://{__name__}.conf")


ConfigStore.instance().store(group="trainer/strategy", name="lwpm_schema", node=LWPMConf, provider="lightning-lwpm")
