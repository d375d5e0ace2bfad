"""Who owns which slice of an optimizer's state, and how slices meet: the only package of `optim` on many ranks."""

from hf_efcp.parallel.collect import collect
from hf_efcp.parallel.group import Group, planned, world
from hf_efcp.parallel.ownership import Local, Replicated
from hf_efcp.parallel.pieces import Piece, balanced
from hf_efcp.parallel.sharing import Sharing, check_replicas, find_sharing, local_part

__all__ = [
    "Group",
    "Local",
    "Piece",
    "Replicated",
    "Sharing",
    "balanced",
    "check_replicas",
    "collect",
    "find_sharing",
    "local_part",
    "planned",
    "world",
]
