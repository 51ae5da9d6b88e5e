"""Measures for validation, under the name that settings have for them."""

from jvpgraph.trainer.evaluation.measures import Measure, Shown, clip_score, distances, fid, image_reward

__all__ = ["Measure", "Shown", "clip_score", "distances", "fid", "image_reward"]
