"""The pruners: torch only, know no model and no exporter."""

from pruning.method import ARITHMETICS, Arithmetic, Features, Kept, Method, Trace
from pruning.methods import METHODS, method_named, selector, settings_numbers
from pruning.spec import DEFAULT_METHOD, PruneSpec, SpecError
from pruning.vlm_pruner import reference
from pruning.vlm_pruner.comparing import ComparingPruner
from pruning.vlm_pruner.static import TokenPruner

__all__ = [
    "ARITHMETICS",
    "DEFAULT_METHOD",
    "METHODS",
    "Arithmetic",
    "ComparingPruner",
    "Features",
    "Kept",
    "Method",
    "PruneSpec",
    "SpecError",
    "TokenPruner",
    "Trace",
    "method_named",
    "reference",
    "selector",
    "settings_numbers",
]
