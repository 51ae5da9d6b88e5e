"""What transform does to the FLUX.1 image transformer at 1024 x 1024, without running it.

The model is built on the meta device, so this takes no memory for its 12 billion weights. ``--layers 1`` keeps one
block of each kind.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import FluxTransformer2DModel

import jvpgraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=19, help="double blocks, and twice as many single ones")
    layers = parser.parse_args().layers
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=layers, num_single_layers=2 * layers, guidance_embeds=True).bfloat16()
        inputs = {
            "hidden_states": torch.randn(1, 4096, 64, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
            "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
            "timestep": torch.rand(1),
            "guidance": torch.rand(1),
            "img_ids": torch.zeros(4096, 3),
            "txt_ids": torch.zeros(512, 3),
        }
        dots = {name: torch.randn_like(inputs[name]) for name in ("hidden_states", "timestep")}
    print(jvpgraph.transform(model).explain(**inputs, tangents=dots))


if __name__ == "__main__":
    main()
