"""Joint attention as a diffusion transformer of two streams has it: keys of text and of an image, one behind the other,
each with a scale and a mean of its own, and the tangent of the image's moved by the time step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHIFTS = (3.0, 10.0, 30.0)  # standard deviations
ERROR = 3e-3  # of o_dot in bfloat16, relative in norm; the rounding of o_dot alone makes 1.7e-3


def joint(
    *,
    text: int,
    image: int,
    text_first: bool,
    shift: float,
    attended: float = 0.0,
    h: int = 2,
    n_q: int = 64,
    d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v and their tangents [1, h, n, d]. The k_dot of all image keys have a part of `shift` standard deviations
    in common, the k of all text keys one that queries like: with attended = 4, a text of a tenth of the keys gets nine
    tenths of the weight."""
    at = torch.arange(text + image)[:, None]
    is_text = at < text if text_first else at >= image
    q, k, v, q_dot, k_dot, v_dot = (torch.randn(1, h, n, d) for n in (n_q, *(text + image,) * 2) * 2)
    liked, of_image, value = (torch.randn(1, h, 1, d) for _ in range(3))
    liked = liked / liked.norm(dim=-1, keepdim=True)
    q = q + math.sqrt(d) * liked
    k = torch.where(is_text, 1.5 * k + attended * liked, k)
    v = torch.where(is_text, v, 0.5 * v + 0.2 * value)
    k_dot = torch.where(is_text, 0.5 * k_dot, k_dot + shift * of_image)
    return [x.to(device, dtype) for x in (q, k, v, q_dot, k_dot, v_dot)]
