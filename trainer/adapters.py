"""How the transformers of diffusers are called, under the name that settings have for it."""

from jvpgraph.trainer.model.adapters import ADAPTERS, Adapter, adapter_of, diffusers_model
from jvpgraph.trainer.model.experts import experts
from jvpgraph.trainer.model.schedulers import scheduler_for

__all__ = ["ADAPTERS", "Adapter", "adapter_of", "diffusers_model", "experts", "scheduler_for"]
