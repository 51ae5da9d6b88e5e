"""A sample of ``make opinfo``: each phase with the ops in which a kind of failure has been seen, and some at large."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import jvpgraph
from tests.opinfo.database import OPS, Call
from tests.opinfo.oracle import truth
from tests.opinfo.phases import PHASES, Case, Phase, cases, examine
from tests.opinfo.run import sweep
from tests.opinfo.table import FAILURES, known, write_table
