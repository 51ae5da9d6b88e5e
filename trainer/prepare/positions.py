"""The largest pictures, clips and texts that a network has positions for: beyond its tables it fails, or reads amiss.

AuraFlow's takes those of other rows without a word. Networks that are not here compute their positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jvpgraph.trainer.model.loading import diffusers
from jvpgraph.trainer.model.padded_text import MULTIPLE


@dataclass(frozen=True)
class Positions:
    """Of a network, in tokens; None: no end.

    Attributes:
        frames, rows, columns: along each axis.
        area: rows times columns.
        text: of a prompt.
    """

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None
    area: int | None = None
    text: int | None = None

    def lacks(self, frames: int, rows: int, columns: int) -> str:
        """What there are too few of for these tokens; empty: nothing."""
        asked = {"frames": frames, "rows": rows, "columns": columns, "area": rows * columns}
        for name, count in asked.items():
            most = getattr(self, name)
            if most is not None and count > most:
                return f"{count} {'tokens' if name == 'area' else f'{name} of tokens'}, and there are {most}"
        return ""


def positions_of(network: str, config: Mapping[str, Any]) -> Positions:
    """Those of a class of diffusers with this configuration."""
    rule = RULES.get(network)
    if rule is None:
        return Positions()
    usual = inspect.signature(getattr(diffusers(), network).__init__).parameters
    whole = {name: parameter.default for name, parameter in usual.items()} | dict(config)
    return rule(whole)


def one_table(config: Mapping[str, Any]) -> Positions:
    length = config["rope_max_seq_len"]
    return Positions(length, length, length)


def square(side: int) -> Positions:
    return Positions(rows=side, columns=side)


def lumina2(config: Mapping[str, Any]) -> Positions:
    """The picture has the position behind the text."""
    text, rows, columns = config["axes_lens"]
    return Positions(rows=rows, columns=columns, text=text - 1)


def z_image(config: Mapping[str, Any]) -> Positions:
    """The text begins at 1, and is padded."""
    text, rows, columns = config["axes_lens"]
    return Positions(rows=rows, columns=columns, text=(text - 2) // MULTIPLE * MULTIPLE)


def cosmos(config: Mapping[str, Any]) -> Positions:
    sizes: Sequence[int] = config["max_size"]
    return Positions(*(size // patch for size, patch in zip(sizes, config["patch_size"])))


def hidream(config: Mapping[str, Any]) -> Positions:
    return Positions(area=math.prod(config["max_resolution"]) // config["patch_size"] ** 2)


RULES = {
    "AuraFlowTransformer2DModel": lambda config: square(math.isqrt(config["pos_embed_max_size"])),
    "CosmosTransformer3DModel": cosmos,
    "HiDreamImageTransformer2DModel": hidream,
    "Lumina2Transformer2DModel": lumina2,
    "SanaVideoTransformer3DModel": one_table,
    "SD3Transformer2DModel": lambda config: square(config["pos_embed_max_size"]),
    "SkyReelsV2Transformer3DModel": one_table,
    "WanTransformer3DModel": one_table,
    "ZImageTransformer2DModel": z_image,
}
