"""From a folder of pictures, clips or prompts to shards, by the components of a diffusers checkpoint."""

from jvpgraph.trainer.data.prepared import prepared
from jvpgraph.trainer.prepare.latents import decoder

__all__ = ["decoder", "prepared"]
