"""Attention, and what goes with it, that models call from other packages.

In a graph with tangents, a call of a function in the table is traced as a call of ours, which computes the same by our
kernel: value and tangent in one sweep. Ops of theirs that are reached otherwise have rules.
"""

from jvpgraph.foreign import (
    aten_efficient,
    diffusers,
    flash_attn,
    flash_attn_fused,
    natten,
    ops,
    sage,
    torch_varlen,
    xformers,
)

__all__ = [
    "aten_efficient",
    "diffusers",
    "flash_attn",
    "flash_attn_fused",
    "natten",
    "ops",
    "sage",
    "torch_varlen",
    "xformers",
]
