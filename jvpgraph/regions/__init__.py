"""Parts of a model that are graphs of their own, with op-by-op code around them."""

from jvpgraph.regions.find import Choice, check_choice, find_regions, hooks_forbid_one_graph
from jvpgraph.regions.run import Group, Regions, brief
from jvpgraph.regions.small import SmallGraphs

__all__ = [
    "Choice",
    "Group",
    "Regions",
    "SmallGraphs",
    "brief",
    "check_choice",
    "find_regions",
    "hooks_forbid_one_graph",
]
