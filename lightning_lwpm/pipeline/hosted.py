"""Brings small tensors to the host together: for each copy the host waits until the device has nothing left to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["hosted"]


def hosted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in host memory, those of one device and type by one copy; what is there already stays as it is."""
    found = list(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(found):
        if tensor.device.type != "cpu":
            kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in kinds.values():
        flat = torch.cat([found[place].detach().reshape(-1) for place in places]).cpu()
        for place, part in zip(places, flat.split([found[place].numel() for place in places]), strict=True):
            found[place] = part.view(found[place].shape)
    return found
