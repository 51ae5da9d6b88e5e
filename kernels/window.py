"""Which keys a query sees by its position: everything, a causal mask, a sliding window."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CAUSAL", "EVERYTHING", "Window", "hide_more", "packed_mask", "places"]


class Window(NamedTuple):
    """Query i sees the keys from i - left to i + right; None: no limit on that side.

    Positions are counted from the first query and the first key (top left aligned, as torch's SDPA), within one
    sequence where several are packed.
    """

    left: int | None = None
    right: int | None = None

    @staticmethod
    def of(left: int, right: int) -> Window:
        """As callers write it, with -1 for no limit."""
        return Window(None if left < 0 else left, None if right < 0 else right)

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
    of_q, inside_q, at_q = places(length_q, cu_seqlens_q[:-1], cu_seqlens_q[1:])
    of_kv, inside_kv, at_kv = places(length_kv, cu_seqlens_kv[:-1], cu_seqlens_kv[1:])
    own = (of_q[:, None] == of_kv) & inside_q[:, None] & inside_kv
    return (own & ~window.hides(at_kv - at_q[:, None]))[None, None]


def places(length: int, starts: Tensor, ends: Tensor, from_the_end: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position the sequence that began last, whether it is in it, and where, counted from its start or its end.

    Args:
        starts, ends: of the sequences; ascending. Between them may be gaps.
    """
    at = torch.arange(length, device=starts.device)
    if not starts.shape[0]:
        return at, torch.zeros_like(at, dtype=torch.bool), at
    sequence = torch.searchsorted(starts.long().contiguous(), at, right=True) - 1
    known = sequence.clamp(min=0)
    inside = (sequence >= 0) & (at < ends.long()[known])
    return sequence, inside, at - (ends if from_the_end else starts).long()[known]


def hide_more(mask: Tensor, bias: Tensor | None) -> Tensor:
    """The bias that hides what a boolean mask hides, too."""
    if bias is None:
        return mask
    return mask & bias if bias.dtype == torch.bool else torch.where(mask, bias, bias.new_full((), -math.inf))
