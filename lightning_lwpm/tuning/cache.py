"""Keeps measured costs on disk, so that the next start of the same model on the same machine need not measure.

One file for each environment (device, number of threads, version of torch, precision); in it, by the digest of a
segment, its seconds, and what the connections of ranks cost. What is chosen by them, such as the number of
micro-batches, is then the same in the next run, and with it every bit of the result. ``LWPM_CACHE`` names another
folder; ``LWPM_CACHE=off`` keeps nothing.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from platformdirs import user_cache_path

from lightning_lwpm.partition.costs import CallCost, Link

__all__ = ["CostCache", "environment"]

_LINK = "link "  # no digest of a segment begins with it


def environment(device: torch.device, precision: str) -> str:
    """All that measured seconds depend on beside the segment."""
    name = _cpu_name() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type} {name}{threads}, torch {torch.__version__}, precision {precision}"


class CostCache:
    """The measured costs of one environment.

    Args:
        environment: See :func:`environment`.
        folder: Where to keep them; by default as ``LWPM_CACHE`` says, or in the user's folder for such things.
    """

    def __init__(self, environment: str, folder: Path | None = None) -> None:
        self.environment = environment
        name = hashlib.sha256(environment.encode()).hexdigest()[:16]
        folder = folder or _folder()
        self.path = folder / f"costs-{name}.json" if folder is not None else None

    def read(self, digests: Iterable[str]) -> dict[str, CallCost]:
        """What is known of some segments. A file that cannot be read counts as empty."""
        known = self._load()
        found = {digest: known.get(digest, ()) for digest in digests}
        return {digest: CallCost(*seconds) for digest, seconds in found.items() if len(seconds) == 3}

    def write(self, costs: Mapping[str, CallCost]) -> None:
        """Add costs. A folder that cannot be written is no reason to stop."""
        if costs:
            self._keep({digest: (c.forward, c.backward, c.weight) for digest, c in costs.items()})

    def read_link(self, name: str) -> Link | None:
        """What is known of the connections of some ranks."""
        known = self._load().get(_LINK + name, ())
        return Link(*known) if len(known) == 2 else None

    def write_link(self, name: str, link: Link) -> None:
        """Add what the connections of some ranks cost."""
        self._keep({_LINK + name: (link.latency, link.bytes_per_second)})

    def _keep(self, more: Mapping[str, tuple[float, ...]]) -> None:
        if self.path is None:
            return
        seconds = self._load() | dict(more)
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump({"environment": self.environment, "seconds": seconds}, file)
            try:
                os.replace(file.name, self.path)
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _load(self) -> dict[str, tuple[float, ...]]:
        """Forward, backward and weight seconds of each segment in the file; latency and speed of links."""
        if self.path is not None:
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                seconds = json.loads(self.path.read_text())["seconds"]
                return {key: tuple(map(float, numbers)) for key, numbers in seconds.items()}
        return {}


def _folder() -> Path | None:
    named = os.environ.get("LWPM_CACHE", "")
    if named.lower() == "off":
        return None
    return Path(named) if named else user_cache_path("lightning_lwpm")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
