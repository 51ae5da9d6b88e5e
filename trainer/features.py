"""Feature spaces, under the name that settings have for it."""

from jvpgraph.trainer.evaluation.features import digits_classifier, pixels, torchscript, trained_classifier

__all__ = ["digits_classifier", "pixels", "torchscript", "trained_classifier"]
