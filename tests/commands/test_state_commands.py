"""``lwpm merge`` and ``lwpm split``: there and back, without the model's code."""

import argparse
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from training.runs import same

from lightning_lwpm.cli import main


def checkpoint() -> dict[str, object]:
    weight = torch.randn(40, 30)
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(40, 30)}}
    return {
        "epoch": 3,
        "state_dict": {
            "weight": weight,
            "half": torch.randn(5, 9).bfloat16(),
            "turned": torch.randn(9, 30).t(),
            "tied": weight,
        },
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "hyper_parameters": {"width": 40, "names": ["a", ("b", 2)]},
    }


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, folder, back = tmp_path / "one.ckpt", tmp_path / "shards.ckpt", tmp_path / "back.ckpt"
    torch.save(checkpoint(), one)
    assert main(["split", str(one), str(folder)]) == 0 and folder.is_dir()
    assert main(["merge", str(folder), str(back)]) == 0 and back.is_file()
    same(torch.load(one), torch.load(back))
    for path in (one, back):
        weights = torch.load(path)["state_dict"]
        assert weights["weight"].data_ptr() == weights["tied"].data_ptr(), f"tied weights are one tensor in {path}"
    (data,) = folder.glob("data-*")
    assert len(FileSystemReader(data).read_metadata().state_dict_metadata) == 4, "tied weights are written once"
    text, listed = tmp_path / "text", tmp_path / "listed"
    text.write_text("hello")
    torch.save([1], listed)
    capsys.readouterr()
    for command, expected in (
        (["merge", str(one), str(tmp_path / "x")], "is no sharded checkpoint"),
        (["merge", str(folder), str(tmp_path)], "is a folder"),
        (["split", str(folder), str(tmp_path / "x")], "is no file"),
        (["split", str(one), str(back)], "is a file"),
        (["split", str(text), str(tmp_path / "x")], "it is truncated, or no file of `torch.save`"),
        (["split", str(listed), str(tmp_path / "x")], "holds list, which is no checkpoint"),
    ):
        assert main(command) == 1
        assert expected in " ".join(capsys.readouterr().err.split())


def test_what_must_be_unpickled_needs_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one.ckpt"
    torch.save({**checkpoint(), "hyper_parameters": argparse.Namespace(width=40)}, one)
    assert main(["split", str(one), str(tmp_path / "shards")]) == 1
    assert "--trusted" in capsys.readouterr().err and not (tmp_path / "shards").exists()
    assert main(["split", str(one), str(tmp_path / "shards"), "--trusted"]) == 0
    assert main(["merge", str(tmp_path / "shards"), str(tmp_path / "back"), "--trusted"]) == 0
    assert torch.load(tmp_path / "back", weights_only=False)["hyper_parameters"].width == 40
