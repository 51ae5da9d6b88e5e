"""Training objectives, one file each: settings, and a function of (student, teacher, batch, rng, config)."""

from jvpgraph.trainer.objectives.adversarial import Adversarial
from jvpgraph.trainer.objectives.data import Data
from jvpgraph.trainer.objectives.dcm import DCM
from jvpgraph.trainer.objectives.dmd import DMD
from jvpgraph.trainer.objectives.flow import FlowMatching
from jvpgraph.trainer.objectives.flow_map import FlowMap
from jvpgraph.trainer.objectives.free_flow import FreeFlow
from jvpgraph.trainer.objectives.mean_flow import MeanFlow
from jvpgraph.trainer.objectives.objective import LOSSES, Objective, Terms, loss_of, objective
from jvpgraph.trainer.objectives.rcm import RCM
from jvpgraph.trainer.objectives.scm import SCM
from jvpgraph.trainer.objectives.terms import Term, WeightedTerms

__all__ = [
    "DCM",
    "DMD",
    "LOSSES",
    "RCM",
    "SCM",
    "Adversarial",
    "Data",
    "FlowMap",
    "FlowMatching",
    "FreeFlow",
    "MeanFlow",
    "Objective",
    "Term",
    "Terms",
    "WeightedTerms",
    "loss_of",
    "objective",
]
