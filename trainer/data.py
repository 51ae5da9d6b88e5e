"""scikit-learn's handwritten digits: 1797 real images of 8x8 pixels in 17 grey levels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images x0 [B, 1, 8, 8], float32, zero mean and unit variance over the data set; labels [B], int64."""

    x0: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """The whole data set in memory; grey level = mean + std * x0, from 0 (paper) to 16 (ink)."""

    x0: Tensor
    labels: Tensor
    mean: float
    std: float

    def draw(self, size: int, rng: torch.Generator) -> Batch:
        """`size` images with replacement."""
        index = torch.randint(len(self.labels), (size,), generator=rng)
        return Batch(self.x0[index], self.labels[index])

    def grey(self, x0: Tensor) -> Tensor:
        """Normalised images -> grey levels, 0 to 16."""
        return (self.mean + self.std * x0).clamp(0, 16)


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    mean, std = grey.mean().item(), grey.std().item()
    return Digits((grey - mean) / std, torch.from_numpy(labels).long(), mean, std)
