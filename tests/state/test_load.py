"""What other versions wrote is read."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.state.load import fill, read_rest
from lightning_lwpm.state.shards import ShardedSave


class Older(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    @override
    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_older_pythons(tmp_path: Path) -> None:
    weight = torch.rand(100, 200)
    saving = ShardedSave(Mailbox(0, 1, lambda value: [value]), 0, {"state_dict": {"w": weight}}, tmp_path / "c", False)
    saving.start(later=False)
    saving.wait()
    rest, data = read_rest(tmp_path / "c", weights_only=True)
    metadata = data / ".metadata"
    value = pickle.loads(metadata.read_bytes())
    with metadata.open("wb") as stream:
        Older(stream, protocol=4).dump(value)
    assert b"getattr" in metadata.read_bytes()
    assert torch.equal(fill(rest, data)["state_dict"]["w"], weight)
