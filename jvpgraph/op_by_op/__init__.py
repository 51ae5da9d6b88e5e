"""Forward mode one op at a time, for any Python code: see :mod:`jvpgraph.op_by_op.mode`."""

from jvpgraph.op_by_op.levels import refuse_other_levels
from jvpgraph.op_by_op.mode import OpByOp
from jvpgraph.op_by_op.modules import module_path
from jvpgraph.op_by_op.refusals import user_line

__all__ = ["OpByOp", "module_path", "refuse_other_levels", "user_line"]
