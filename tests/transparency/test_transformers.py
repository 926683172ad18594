"""Models as `transformers` defines them, unchanged: equal to one device in every bit, cut into 2, 3 and 4 stages."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**TEXT, "num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(model: str, config: str, **settings: Any) -> torch.nn.Module:
    """A model by the names of its class and its configuration's class."""
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).train()


def gpt2(**settings: Any) -> Callable[[], torch.nn.Module]:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return partial(build, "GPT2LMHeadModel", "GPT2Config", **sizes, **no_dropout, **settings)


def tokens(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens; labels are the tokens."""
    torch.manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(1, VOCABULARY, (6, 10))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            lengths = torch.randint(4, 11, (6, 1))
            batch["attention_mask"] = (torch.arange(10) < lengths).long()
            batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return batches


def pairs() -> list[dict[str, torch.Tensor]]:
    """Batches for an encoder and a decoder."""
    torch.manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (6, 9)),
            "attention_mask": (torch.arange(9) < torch.randint(4, 10, (6, 1))).long(),
            "labels": torch.randint(1, VOCABULARY, (6, 7)),
        }
        for _ in range(2)
    ]


def pictures(size: int = 32) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(6, 3, size, size), "labels": torch.randint(0, 4, (6,))} for _ in range(2)]


def sounds() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_features": torch.randn(6, 8, 40), "labels": torch.randint(1, 64, (6, 7))} for _ in range(2)]


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that the model computes itself; its cache is used as it is by default."""
    return model(**batch).loss


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


Model = tuple[Callable[[], torch.nn.Module], Callable[[], list[Any]], str]

# What cannot be equal in every bit, and from which number of stages on: see the causes in `cases.py`
SHARED = "a weight of several stages, with several micro-batches"
SHARED_OFTEN = "a weight that one of several stages uses more than once"

MODELS: dict[str, Model] = {
    "gpt2, tied": (gpt2(), tokens, SHARED),
    "gpt2, untied": (gpt2(tie_word_embeddings=False), tokens, ""),
    "gpt2, padded, no cache": (gpt2(tie_word_embeddings=False, use_cache=False), partial(tokens, True), ""),
    "llama, padded": (partial(build, "LlamaForCausalLM", "LlamaConfig", **LLAMA), partial(tokens, True), ""),
    "mistral": (partial(build, "MistralForCausalLM", "MistralConfig", sliding_window=4, **LLAMA), tokens, ""),
    "gemma": (partial(build, "GemmaForCausalLM", "GemmaConfig", head_dim=8, **LLAMA), tokens, SHARED),
    "qwen3": (partial(build, "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **LLAMA), tokens, ""),
    "mixtral": (
        partial(build, "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, output_router_logits=True, **LLAMA),
        tokens,
        "",
    ),
    "opt": (
        partial(
            build,
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=32,
            dropout=0.0,
            tie_word_embeddings=False,
        ),
        tokens,
        "",
    ),
    "t5": (
        partial(
            build,
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        ),
        pairs,
        SHARED_OFTEN,
    ),
    "bert": (
        partial(
            build,
            "BertForMaskedLM",
            "BertConfig",
            num_hidden_layers=4,
            max_position_embeddings=32,
            **TEXT,
            **NO_DROPOUT,
        ),
        partial(tokens, True),
        SHARED,
    ),
    "vit": (
        partial(
            build,
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=4,
            **NO_DROPOUT,
        ),
        partial(pictures, 16),
        "",
    ),
    "resnet": (
        partial(
            build,
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16, 16],
            depths=[1, 2, 1],
            layer_type="basic",
            num_labels=4,
        ),
        pictures,
        "",
    ),
    "whisper": (
        partial(
            build,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            d_model=32,
            num_mel_bins=8,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=20,
            max_target_positions=16,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        sounds,
        SHARED,
    ),
}
SETTINGS = [(2, 1, "1f1b"), (3, 3, "1f1b"), (4, 4, "gpipe")]


@pytest.mark.parametrize(("stages", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_device(pool: Pool, name: str, stages: int, count: int, schedule: str) -> None:
    make, batches, inexact = MODELS[name]
    expected = train_single(make, step, batches(), count, adamw)
    results = pool.run(stages, train_pipelined, make, step, batches(), count, schedule, "auto", adamw, timeout=80)
    rounding = inexact == SHARED_OFTEN or (inexact == SHARED and count > 1)
    compare(expected, results, 1e-5 if rounding else 0.0)
