"""What a step returned for each micro-batch, made into what it would have returned for the batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import ConfigurationError, PipelineError
from lightning_lwpm.staging.remote import localise

__all__ = ["has_loss", "loss_of", "mean_loss", "merge_outputs"]


def has_loss(output: Any) -> bool:
    """Whether there is a loss in what ``training_step`` returned."""
    return isinstance(output.get("loss") if isinstance(output, Mapping) else output, Tensor)


def loss_of(output: Any) -> Tensor:
    """The loss in what ``training_step`` returned.

    Args:
        output: What it returned.

    Raises:
        ConfigurationError: if there is no loss that can be trained on.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"`training_step` returned {type(output).__name__} {output!r:.200}: return the loss as a tensor, a dict "
            "with the key 'loss', or None to leave the samples out"
        )
    loss = localise(loss)
    if not loss.requires_grad:
        raise PipelineError(
            "the loss that `training_step` returned does not depend on the output of any trainable layer (it does not "
            "require a gradient), so there is nothing to train. Compute the loss from the model's output, outside "
            "`torch.no_grad()` and without `.detach()`."
        )
    return loss


def merge_outputs(outputs: Sequence[Any], losses: Mapping[int, Tensor], sizes: Sequence[int]) -> Any:
    """One output for the batch: the loss is the mean over samples, tensors with one row a sample are joined.

    Args:
        outputs: What the step returned for each micro-batch.
        losses: The loss of each, by number, but for those that the step has skipped.
        sizes: The samples of each.
    """
    if not losses:
        return outputs[0]
    outputs, sizes = [outputs[i] for i in losses], [sizes[i] for i in losses]
    loss = mean_loss(list(losses.values()), sizes)
    if not isinstance(outputs[0], Mapping):
        return loss
    merged: dict[str, Any] = {}
    for key in outputs[0]:
        values = [localise(v) if isinstance(v := output.get(key), Tensor) else v for output in outputs]
        merged[key] = loss if key == "loss" else _merge(values, sizes)
    return merged


def mean_loss(losses: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The mean of the micro-batches' losses, weighted by samples."""
    if len(losses) == 1:
        return losses[0].detach()
    total = sum(sizes)
    parts = [loss.detach() * (size / total) for loss, size in zip(losses, sizes, strict=True)]
    return torch.stack(parts).sum()


def _merge(values: list[Any], sizes: Sequence[int]) -> Any:
    if len(values) == 1:
        return values[0]
    if all(isinstance(value, Tensor) for value in values):
        values = [value.detach() for value in values]
        if all(value.dim() > 0 and value.shape[0] == size for value, size in zip(values, sizes, strict=True)):
            return torch.cat(values)
        if all(value.dim() == 0 and value.is_floating_point() for value in values):
            return mean_loss(values, sizes)
    return values
