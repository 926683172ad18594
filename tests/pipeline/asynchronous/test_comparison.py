"""The benchmark's stages are the model of the examples, and a comparison that was cut goes on where it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples/benchmarks/asynchronous"))

import corrections
from character_model import Data, stages
from corrections import chosen

from examples.models.gpt import GPT
from lightning_lwpm.pipeline.asynchronous.error_feedback import ErrorFeedback
from lightning_lwpm.pipeline.asynchronous.stash import Stash


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_stages_are_the_model(count):
    parts = stages(count, 2, 10, 3, chosen("none"), init="gpt")
    torch.manual_seed(3)
    net = GPT(vocab_size=96, block_size=64, n_layer=8, n_embd=96, n_head=4, dropout=0.0)
    tokens = torch.randint(0, 96, (2, 64))
    torch.testing.assert_close(torch.nn.Sequential(*(stage.module for stage in parts))(tokens), net(tokens))


def test_targets_are_the_next_characters():
    (inputs, targets), _ = Data().batches(2, seed=0)
    assert inputs.shape == targets.shape == (32, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_options_of_a_correction():
    made = chosen("error_feedback:limit=2,strength=0.5")
    assert (made.func, made.keywords) == (ErrorFeedback, {"limit": 2.0, "strength": 0.5})
    both = chosen("error_feedback:limit=2,strength=0.5+stash").keywords["kinds"]
    assert (both[0].keywords, both[1].func) == (made.keywords, Stash)


def test_a_comparison_goes_on_where_it_was_cut(tmp_path):
    out = tmp_path / "losses.json"
    command = [sys.executable, corrections.__file__, "--out", str(out), "--steps", "1", "--stages", "2"]
    subprocess.run([*command, "--corrections", "none"], check=True)
    first = json.loads(out.read_text())
    assert [run["correction"] for run in first] == ["exact", "none"]
    shown = subprocess.run([*command, "--corrections", "none", "stash"], check=True, capture_output=True, text=True)
    both = json.loads(out.read_text())
    assert both[:2] == first
    assert [run["correction"] for run in both] == ["exact", "none", "stash"]
    assert "'exact'" not in shown.stdout and "stash" in shown.stdout
