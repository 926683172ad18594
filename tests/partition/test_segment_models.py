"""Real models from `transformers`: every segment runs by itself, and deeper models have no more distinct ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.partition.segment import Segment

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 13).view(2, 6)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}


def gpt2(depth: int) -> tuple[Any, Any]:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=depth, n_head=2)
    return transformers.GPT2LMHeadModel(config), TEXT


def t5(depth: int) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=depth, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), TEXT


def vit(depth: int) -> tuple[Any, Any]:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = transformers.ViTConfig(num_hidden_layers=depth, **sizes)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    return transformers.ViTForImageClassification(config), batch


def look(build: Callable[[int], tuple[Any, Any]], depth: int) -> tuple[Any, Probe]:
    model, batch = build(depth)
    model.train()
    return model, probe(model, lambda: model(**batch).loss)


def run(segment: Segment, model: Any) -> None:
    """Forward and backward; every layer whose output matters has gradients."""
    modules = segment.modules(model, CPU)
    results = segment.run(modules, segment.inputs(CPU))
    assert results, f"nothing comes out of {segment.layers}"
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    for name, module in modules.items():
        for weight in module.parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("build", [gpt2, t5, vit])
def test_all_segments_run_alone(build: Callable[[int], tuple[Any, Any]]) -> None:
    model, seen = look(build, 2)
    for segment in {segment.digest: segment for segment in seen.segments}.values():
        run(segment, model)


@pytest.mark.parametrize("build", [gpt2, t5, vit])
def test_depth_adds_no_distinct_segments(build: Callable[[int], tuple[Any, Any]]) -> None:
    few, many = ([s.digest for s in look(build, depth)[1].segments] for depth in (3, 6))
    assert len(many) > 1.7 * len(few) and set(many) == set(few)
    assert len(set(many)) < len(many) / 2
