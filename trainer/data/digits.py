"""scikit-learn's handwritten digits: 1797 real images of 8x8 pixels in 17 grey levels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.data.sample import Sample


@dataclass(frozen=True)
class Digits:
    """The whole data set in memory: x0 [N, 1, 8, 8], float32, zero mean and unit variance; labels [N], int64.

    Grey level = mean + std * x0, from 0 (paper) to 16 (ink).  The condition of a sample is its class, `labels` [].
    """

    x0: Tensor
    labels: Tensor
    mean: float
    std: float

    @property
    def fingerprint(self) -> str:
        return f"digits {len(self)}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"digits/{index}", self.x0[index], {"labels": self.labels[index]})

    def batch(self, index: Tensor) -> Batch:
        """The images `index` [B], without making samples of them."""
        keys = tuple(f"digits/{i}" for i in index.tolist())
        return Batch(self.x0[index], {"labels": self.labels[index]}, keys)

    def grey(self, x0: Tensor) -> Tensor:
        """Normalised images -> grey levels, 0 to 16."""
        return (self.mean + self.std * x0).clamp(0, 16)


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    mean, std = grey.mean().item(), grey.std().item()
    return Digits((grey - mean) / std, torch.from_numpy(labels).long(), mean, std)
