"""What lmms-eval finds by its entry point: where its model `pruneport` lies; loads nothing else."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The ModelManifest that lmms-eval asks the entry points of its group `lmms_eval.models` for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pruneport", simple_class_path="pruneport.export.evaluation.lmms.Pruneport")
