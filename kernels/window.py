"""Which keys a query sees by its position: everything, a causal mask, a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CAUSAL", "EVERYTHING", "Window"]


class Window(NamedTuple):
    """Query i sees the keys from i - left to i + right; None: no limit on that side.

    Positions are counted from the first query and the first key (top left aligned, as torch's SDPA), within one
    sequence where several are packed.
    """

    left: int | None = None
    right: int | None = None

    def keys(self, first: int, rows: int, length: int) -> tuple[int, int]:
        """[start, end) of the keys that one of the queries [first, first + rows) sees, out of `length`."""
        start = 0 if self.left is None else min(max(0, first - self.left), length)
        end = length if self.right is None else min(length, first + rows + self.right)
        return start, max(start, end)

    def cuts(self, first: int, rows: int, start: int, end: int) -> bool:
        """Whether one of the queries [first, first + rows) does not see one of the keys [start, end)."""
        too_far_left = self.left is not None and start < first + rows - 1 - self.left
        return too_far_left or (self.right is not None and end > first + self.right + 1)

    def hides(self, ahead: Tensor) -> Tensor:
        """True where a key that lies `ahead` positions after the query is out of sight."""
        left = False if self.left is None else ahead < -self.left
        right = False if self.right is None else ahead > self.right
        return torch.zeros_like(ahead, dtype=torch.bool) | left | right


EVERYTHING = Window()
CAUSAL = Window(right=0)
