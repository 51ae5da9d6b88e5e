"""Which keys a query sees by its position: everything, a causal mask, a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CAUSAL", "EVERYTHING", "Window", "packed_mask"]


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


def packed_mask(cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, length_q: int, length_kv: int, window: Window) -> Tensor:
    """[1, 1, Lq, Lkv], True where a query of packed sequences sees a key. Does not wait for the device."""

    def places(cu: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Of which sequence each row is, and at which position in it; none is len(cu) - 1 and more."""
        rows = torch.arange(length, device=cu.device, dtype=cu.dtype)
        sequence = torch.searchsorted(cu, rows, right=True) - 1
        return sequence, rows - cu[sequence.clamp(min=0)]

    (of_q, at_q), (of_kv, at_kv) = places(cu_seqlens_q, length_q), places(cu_seqlens_kv, length_kv)
    own = (of_q[:, None] == of_kv) & (of_q[:, None] < cu_seqlens_q.shape[0] - 1)
    return (own & ~window.hides(at_kv - at_q[:, None]))[None, None]
