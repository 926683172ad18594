"""A U-Net: each level of the way down is joined, by concatenation, to the same level of the way up."""

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["UNet"]


class Double(nn.Module):
    """Two convolutions with normalisation.

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Labels each pixel of a picture (Ronneberger et al., arXiv 1505.04597).

    ::

        down.0 ----------------------------> up.0 -> head
           down.1 -----------------> up.1             each level down halves the picture and doubles the channels
              down.2 ------> up.2                     long skips: what down.0 gives is used last
                    bottom

    Args:
        width: Channels of the first level.
        depth: Number of levels above the bottom.
        channels: Channels of the picture.
        classes: Labels to choose from.
    """

    def __init__(self, width: int = 32, depth: int = 4, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(Double(a, b) for a, b in zip([channels, *widths[:-2]], widths[:-1], strict=True))
        self.pool = nn.MaxPool2d(2)
        self.bottom = Double(widths[-2], widths[-1])
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.up = nn.ModuleList(Double(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Scores of each class for each pixel, (samples, classes, height, width), of a picture whose sides are
        multiples of ``2 ** depth``."""
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for widen, level, skip in reversed(list(zip(self.widen, self.up, skips, strict=True))):
            x = level(torch.cat([skip, widen(x)], dim=1))
        return self.head(x)
