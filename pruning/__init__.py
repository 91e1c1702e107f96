"""The pruner: torch only, knows no model and no exporter."""

from pruning import reference
from pruning.comparing import ComparingPruner
from pruning.spec import PruneSpec, SpecError
from pruning.static import TokenPruner

# The static forms of the pruner, by the name that a manifest gives them.
FORMS: dict[str, type[TokenPruner | ComparingPruner]] = {"default": TokenPruner, "comparing": ComparingPruner}

__all__ = ["FORMS", "ComparingPruner", "PruneSpec", "SpecError", "TokenPruner", "reference"]
