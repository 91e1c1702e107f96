"""The pocket model: a LLaVA of 18 MB with the real image geometry, trained by training/ on scenes that it renders."""

from __future__ import annotations

from pathlib import Path

from export.families import MODELS

POCKET = MODELS["pocket"]


def pocket_folder() -> Path:
    """The checkpoint's folder, in Hugging Face's layout; it comes with the package and is there to be read."""
    return Path(__file__).with_name("pocket")
