"""Where a tangent loses its digits: see :mod:`jvpgraph.diagnosis.run`."""

from jvpgraph.diagnosis.records import Difference, Loss, ModuleRecord, OpRecord
from jvpgraph.diagnosis.report import Diagnosis
from jvpgraph.diagnosis.run import diagnose

__all__ = ["Diagnosis", "Difference", "Loss", "ModuleRecord", "OpRecord", "diagnose"]
