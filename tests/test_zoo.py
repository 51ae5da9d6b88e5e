"""Thirteen families of diffusers' transformers against their oracles; ``make zoo`` runs all classes."""

from __future__ import annotations

import pytest

from tests.zoo.base import QUIET
from tests.zoo.cases import CASES, missing_classes
from tests.zoo.run import examine

WHOLE = (
    "DiTTransformer2DModel",  # adaLN-zero, class labels
    "PixArtTransformer2DModel",  # cross-attention with key padding
    "SD3Transformer2DModel",  # joint attention
    "FluxTransformer2DModel",  # double and single stream, guidance
    "QwenImageTransformer2DModel",  # complex rotary embedding
    "SanaTransformer2DModel",  # linear attention, depthwise convolutions
    "WanTransformer3DModel",  # video
    "HunyuanVideoTransformer3DModel",  # token refiner, masks
    "CogVideoXTransformer3DModel",  # 3-D rotary embedding
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",  # attends to as many text tokens as the mask says
    "ZImageTransformer2DModel",  # lists of latents
    "T5FilmDecoder",  # attention written by hand
)

# Dynamo looks at .grad of what a region is given.
NOT_A_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
# Its first call fills a cache under a context manager that Dynamo does not know.
FIRST_IN_REGIONS = ("ZImageTransformer2DModel",)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(NOT_A_LEAF),
    *(pytest.mark.filterwarnings(quiet) for quiet in QUIET),
]


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph(name):
    result = examine(CASES[name])
    assert result.right, str(result)
    assert result.capture == ("regions" if name in FIRST_IN_REGIONS else "whole")
    assert result.variants == 2
    assert result.table > 50


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_inductor(name):
    result = examine(CASES[name], backend="inductor", variants=(0,))
    assert result.right, str(result)


def test_attention_written_by_hand_is_fused():
    """T5FilmDecoder spells softmax(q k') v out."""
    import jvpgraph
    from tests.zoo.oracle import random_tangents

    case = CASES["T5FilmDecoder"]
    inputs = case.inputs(0)
    found = jvpgraph.transform(case.build()).explain(**inputs, tangents=random_tangents(inputs, case.tangents))
    assert found.fused == len(found.swapped) > 0
    assert not found.left


def test_data_dependent_models_are_right_with_regions():
    result = examine(CASES["OmniGenTransformer2DModel"], variants=(0,))
    assert result.capture == "regions"
    assert "data-dependent" in result.cause
    assert result.right, str(result)
    assert "2 x OmniGenBlock" in result.regions


def test_no_class_is_missing():
    """Every transformer of the installed diffusers has a case or a reason."""
    assert missing_classes() == []
