"""Distillation of diffusion transformers with the tangents that `jvpgraph.transform` gives."""
