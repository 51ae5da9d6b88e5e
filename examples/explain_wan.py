"""What transform does to the Wan2.1 1.3B video transformer at 480p, 81 frames, without running it.

The model is built on the meta device, so this takes no memory for its weights. ``--layers 2`` is quicker, and with
``JVPGRAPH_DUMP=folder`` the graph after every pass is written there.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import WanTransformer3DModel

import jvpgraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="transformer blocks; Wan2.1 1.3B has 30")
    layers = parser.parse_args().layers
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers
        ).bfloat16()
        inputs = {
            "hidden_states": torch.randn(1, 16, 21, 60, 104, dtype=torch.bfloat16),
            "timestep": torch.rand(1),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
        }
        dots = {name: torch.randn_like(inputs[name]) for name in ("hidden_states", "timestep")}
    print(jvpgraph.transform(model).explain(**inputs, tangents=dots))


if __name__ == "__main__":
    main()
