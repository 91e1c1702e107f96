"""The pruner: torch only, knows no model and no exporter."""

from pruning import reference
from pruning.spec import PruneSpec, SpecError
from pruning.static import TokenPruner

__all__ = ["PruneSpec", "SpecError", "TokenPruner", "reference"]
