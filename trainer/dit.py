"""The digits' diffusion transformer, under the name that settings have for it."""

from jvpgraph.trainer.model.dit import DiT, DiTConfig, call_dit, dit

__all__ = ["DiT", "DiTConfig", "call_dit", "dit"]
