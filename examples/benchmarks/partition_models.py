"""The models whose partition is measured: random weights, a micro-batch of 0.3 to 1 s on one CPU core."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CASES", "Case"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model with a micro-batch.

    Args:
        title: What people call it.
        build: Makes it.
        batch: Makes a micro-batch.
        step: Runs it: from model and micro-batch to the loss.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Values]
    step: Callable[[nn.Module, Values], Tensor]


def _loss(model: nn.Module, batch: Values) -> Tensor:
    return model(**batch).loss


def _labelled(model: nn.Module, batch: Values) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def _transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers  # here, because it takes seconds that the other models need not wait

        return getattr(transformers, model)(getattr(transformers, config)(**settings)).train()

    return build


def _tokens(samples: int, length: int, vocabulary: int, answer: int = 0) -> Callable[[], Values]:
    """Tokens and labels; those of a decoder are ``answer`` tokens long, others as long as the input."""
    return lambda: {
        "input_ids": torch.randint(1, vocabulary, (samples, length)),
        "labels": torch.randint(1, vocabulary, (samples, answer or length)),
    }


def _pictures(samples: int, size: int) -> Callable[[], Values]:
    return lambda: {
        "pixel_values": torch.randn(samples, 3, size, size),
        "labels": torch.randint(0, 1000, (samples,)),
    }


def _unet() -> nn.Module:
    from examples.models.unet import UNet

    return UNet(width=32, depth=4)


_resnet50 = _transformers("ResNetForImageClassification", "ResNetConfig", num_labels=1000)
_llama = _transformers(
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=64_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)

CASES = {
    "resnet32": Case("ResNet-50, 32 x 32", _resnet50, _pictures(32, 32), _loss),
    "resnet224": Case("ResNet-50, 224 x 224", _resnet50, _pictures(2, 224), _loss),
    "unet": Case(
        "U-Net, 128 x 128",
        _unet,
        lambda: {"x": torch.randn(2, 3, 128, 128), "labels": torch.randint(0, 2, (2, 128, 128))},
        _labelled,
    ),
    "gpt2": Case("GPT-2 small", _transformers("GPT2LMHeadModel", "GPT2Config"), _tokens(1, 64, 50_257), _loss),
    "llama": Case("Llama, 64k words", _llama, _tokens(1, 128, 64_000), _loss),
    "t5": Case(
        "T5 small",
        _transformers("T5ForConditionalGeneration", "T5Config", num_layers=6, decoder_start_token_id=0),
        _tokens(2, 128, 32_128, answer=64),
        _loss,
    ),
    "vit": Case(
        "ViT-B/16",
        _transformers("ViTForImageClassification", "ViTConfig", num_labels=1000),
        _pictures(1, 224),
        _loss,
    ),
}
