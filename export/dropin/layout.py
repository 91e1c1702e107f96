"""What a layout is: how the files of a bundle lie for a runtime of other people, and who writes them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from export.backends.backend import Backend
    from export.families.family import Checkpoint, ModelEntry
    from export.graphs.vision import VisionEncoder
    from runtime.bundle import GraphInfo


@dataclass(frozen=True)
class Layout:
    """The layout of a runtime of other people, and what can be made for it: its first text scheme is the default."""

    runtime: str
    backend: Backend
    quant_vision: tuple[str, ...]
    quant_text: tuple[str, ...]
    load: Callable[[], WriteLayout]


class WriteLayout(Protocol):
    """Writes the graphs of cut 0 as somebody else's runtime expects them, with what else it needs.

    `arithmetic` says for each graph by its name what the manifest is to say of it.
    """

    def __call__(
        self,
        checkpoint: Checkpoint,
        entry: ModelEntry,
        vision: VisionEncoder,
        folder: Path,
        *,
        quant_text: str | None,
        text_tokens: int,
        arithmetic: Callable[[str], tuple[str, ...]],
    ) -> tuple[GraphInfo, ...]: ...
