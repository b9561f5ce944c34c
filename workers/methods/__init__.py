"""The merge methods, by the name that a recipe calls them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from workers.errors import RecipeError
from workers.methods.arcee_fusion import ARCEE_FUSION
from workers.methods.base import Method
from workers.methods.breadcrumbs import BREADCRUMBS
from workers.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from workers.methods.consensus import CONSENSUS
from workers.methods.dare_linear import DARE_LINEAR
from workers.methods.dare_ties import DARE_TIES
from workers.methods.della import DELLA
from workers.methods.della_linear import DELLA_LINEAR
from workers.methods.fisher import FISHER
from workers.methods.fisher_ties import FISHER_TIES
from workers.methods.found import found_outside
from workers.methods.karcher import KARCHER
from workers.methods.knots import KNOTS
from workers.methods.linear import LINEAR
from workers.methods.model_stock import MODEL_STOCK
from workers.methods.multislerp import MULTISLERP
from workers.methods.nearswap import NEARSWAP
from workers.methods.nuslerp import NUSLERP
from workers.methods.passthrough import PASSTHROUGH
from workers.methods.ram import RAM, RAMPLUS_TL
from workers.methods.regmean import REGMEAN
from workers.methods.sce import SCE
from workers.methods.slerp import SLERP
from workers.methods.task_arithmetic import TASK_ARITHMETIC
from workers.methods.ties import TIES
from workers.methods.tsv import TSV

_OURS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            LINEAR,
            SLERP,
            NUSLERP,
            MULTISLERP,
            KARCHER,
            TASK_ARITHMETIC,
            TIES,
            DARE_LINEAR,
            DARE_TIES,
            DELLA,
            DELLA_LINEAR,
            BREADCRUMBS,
            BREADCRUMBS_TIES,
            SCE,
            RAM,
            RAMPLUS_TL,
            CONSENSUS,
            TSV,
            KNOTS,
            FISHER,
            FISHER_TIES,
            REGMEAN,
            MODEL_STOCK,
            NEARSWAP,
            ARCEE_FUSION,
            PASSTHROUGH,
        )
    }
)
"""The merge methods of this tree."""

METHODS: Mapping[str, Method] = MappingProxyType({**found_outside(_OURS), **_OURS})
"""Every merge method there is, ours first to be believed: one from outside does not replace it."""


def get_method(name: str) -> Method:
    """The method called ``name``; :class:`RecipeError` with the known names when there is none."""
    if name in METHODS:
        return METHODS[name]
    nearest = get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise RecipeError(
        f"merge_method: {name!r} is not a method that Mergemill knows ({', '.join(METHODS)}){hint}"
    )
