"""Text padded to one length, for networks of diffusers that have no mask for it, or one that hides nothing.

Z-Image takes captions as a list, and their lengths are Python's numbers. It pads a caption to a multiple of 32 with
tokens that it learnt, and the picture's positions begin behind them. Here a caption's own padding ends at such a
multiple, and what is left of the batch's length is seen by nobody.
"""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = 32  # diffusers' SEQ_MULTI_OF


class HidesText:
    """CogView4's attention: the usual one adds a mask's ones and zeros to the scores, diffusers' for training hides."""

    def __init__(self) -> None:
        module = importlib.import_module("diffusers.models.transformers.transformer_cogview4")
        self.usual, self.masked = module.CogView4AttnProcessor(), module.CogView4TrainingAttnProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        text_attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`text_attn_mask` [B, L], int32, instead of a mask."""
        how = {"image_rotary_emb": image_rotary_emb}
        if text_attn_mask is None:
            return self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, **how)
        return self.masked(attn, hidden_states, encoder_hidden_states, text_attn_mask=text_attn_mask, **how)


def take_padded(net: Any) -> None:
    """Lets a ZImageTransformer2DModel read `caption_mask` [B, L] of captions at their full length, where it has one.

    Calls without it, a pipeline's, are not touched.
    """
    vars(net)["caption_mask"] = None
    for method in (patchify_and_embed, _prepare_sequence, _build_unified_sequence):
        vars(net)[method.__name__] = MethodType(method, net)  # which copies of the network have too


def at_full_length(captions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Captions [B, L, D], of which tokens [B, L] count, at a length that the network takes; and their mask, boolean."""
    missing = -captions.shape[1] % MULTIPLE
    return pad(captions, (0, 0, 0, missing)), pad(mask.bool(), (0, missing))


def own_lengths(mask: Tensor) -> Tensor:
    """[B], with the padding that the network itself would add."""
    return (mask.sum(1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def seen(mask: Tensor) -> Tensor:
    """Captions' tokens that others may look at [B, L]."""
    return torch.arange(mask.shape[1], device=mask.device) < own_lengths(mask)[:, None]


def patchify_and_embed(self: Any, images: Any, captions: Any, patch_size: int, f_patch_size: int) -> tuple[Any, ...]:
    """The network's, with padding by the mask and the picture behind the caption's own length."""
    found = type(self).patchify_and_embed(self, images, captions, patch_size, f_patch_size)
    if self.caption_mask is None:
        return found
    images, captions, sizes, image_ids, caption_ids, image_pads, _ = found
    mask = self.caption_mask
    moved = mask.shape[1] - own_lengths(mask)
    first = torch.tensor([1, 0, 0], device=mask.device)
    image_ids = [
        (ids - ~padding[:, None] * by * first).to(ids.dtype) for ids, padding, by in zip(image_ids, image_pads, moved)
    ]
    return images, captions, sizes, image_ids, caption_ids, image_pads, list((~mask).unbind(0))


def _prepare_sequence(
    self: Any, feats: Any, pos_ids: Any, inner_pad_mask: Any, pad_token: Tensor, *rest: Any
) -> tuple[Any, ...]:
    found = type(self)._prepare_sequence(self, feats, pos_ids, inner_pad_mask, pad_token, *rest)
    if self.caption_mask is None or pad_token is not self.cap_pad_token:
        return found
    sequence, frequencies, _, *rest = found
    return (sequence, frequencies, seen(self.caption_mask), *rest)


def _build_unified_sequence(self: Any, picture: Tensor, *rest: Any) -> tuple[Any, ...]:
    found = type(self)._build_unified_sequence(self, picture, *rest)
    mask = self.caption_mask
    if mask is None:
        return found
    sequence, frequencies, _, noise = found
    return sequence, frequencies, torch.cat([mask.new_ones(picture.shape[:2]), seen(mask)], dim=1), noise
