"""Turns a vision-language model into a phone-ready bundle whose image tokens are pruned inside the exported graph.

The public names are those of `__all__`. Each is imported when it is first used, so that nothing heavy is loaded before:
`verify`, `open_bundle` and `explain` need no torch for ONNX bundles.
"""

# In a checkout the rooms lie beside this package, where mypy knows them by their short names only; tests run it over
# the installed wheel, where it sees these.
# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pruneport.rooms import find_rooms

if TYPE_CHECKING:
    import pruneport.pruning.vlm_pruner.reference as _reference
    from pruneport.pruning.spec import PruneSpec as PruneSpec
    from pruneport.pruning.spec import SpecError as SpecError
    from pruneport.pruning.vlm_pruner.static import TokenPruner as TokenPruner
    from pruneport.runtime.ask import Answer as Answer
    from pruneport.runtime.ask import OpenBundle as OpenBundle
    from pruneport.runtime.ask import Took as Took
    from pruneport.runtime.ask import open_bundle as open_bundle
    from pruneport.runtime.bundle import Bundle as Bundle
    from pruneport.runtime.bundle import read_bundle as read_bundle
    from pruneport.runtime.check.verdict import Verdict as Verdict
    from pruneport.runtime.errors import BundleError as BundleError
    from pruneport.runtime.errors import CheckpointError as CheckpointError
    from pruneport.runtime.errors import EngineError as EngineError
    from pruneport.runtime.errors import EngineMissingError as EngineMissingError
    from pruneport.runtime.errors import ExportError as ExportError
    from pruneport.runtime.errors import ImageError as ImageError
    from pruneport.runtime.errors import NotYetError as NotYetError
    from pruneport.runtime.errors import OutputError as OutputError
    from pruneport.runtime.errors import PruneportError as PruneportError
    from pruneport.runtime.errors import RequestError as RequestError
    from pruneport.runtime.explain import Explanation as Explanation
    from pruneport.runtime.explain import explain as explain
    from pruneport.runtime.generation import Prefill as Prefill
    from pruneport.runtime.image import load_photo as load_photo
    from pruneport.runtime.image import preprocess as preprocess

    reference = _reference

    # Type checkers of an installed wheel find the rooms under this package alone: what one file of a room takes from
    # another is unknown to them.
    def verify(
        path: str | os.PathLike[str], *, threads: int | None = None, progress: Callable[[str], None] | None = None
    ) -> Verdict:
        """Checks a bundle from disk; see `runtime.harness.verify`."""


__version__ = "0.1.0"

# Where each public name comes from. The same as above, for Python instead of for type checkers.
_HOMES = {
    "pruning": ("PruneSpec", "SpecError", "TokenPruner", "reference"),
    "runtime.ask": ("Answer", "OpenBundle", "Took", "open_bundle"),
    "runtime.bundle": ("Bundle", "read_bundle"),
    "runtime.errors": (
        "BundleError",
        "CheckpointError",
        "EngineError",
        "EngineMissingError",
        "ExportError",
        "ImageError",
        "NotYetError",
        "OutputError",
        "PruneportError",
        "RequestError",
    ),
    "runtime.explain": ("Explanation", "explain"),
    "runtime.generation": ("Prefill",),
    "runtime.check.verdict": ("Verdict",),
    "runtime.harness": ("verify",),
    "runtime.image": ("load_photo", "preprocess"),
}

__all__ = ["Exported", "__version__", "export_bundle", *(name for names in _HOMES.values() for name in names)]

find_rooms()


def _public(name: str) -> object:
    """Imports a public name when it is first used; ImportError for one that needs torch where torch is not."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: object = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as err:
        if err.name != "torch":
            raise
        raise ImportError(
            f"pruneport.{name} needs torch, which is not installed here; run: pip install 'pruneport[export]'",
            name=err.name,
        ) from err
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to a type checker it would mean that every name is there
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted(__all__)


@dataclass(frozen=True)
class Exported:
    """A finished export: the bundle's folder, and what its check in the engine said."""

    path: Path
    verdict: Verdict


def export_bundle(
    *,
    model: str,
    keep: int | str | Sequence[int | str],
    target: str = "android",
    backend: str | None = None,
    soc: str | None = None,
    min_ios: int | str | None = None,
    precision: str | None = None,
    quant_vision: str | None = None,
    quant_text: str | None = None,
    image_size: int | str | None = None,
    text_tokens: int = 512,
    cut: int | None = None,
    layout: str = "pruneport",
    method: str | None = None,
    only: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    image: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    reference: str = "auto",
    output_dir: str | os.PathLike[str] = "bundles",
    twin: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: bool = False,
) -> Exported:
    """Makes a bundle from a checkpoint and checks it in its engine, as `pruneport export` does.

    Each choice is the flag of that name; `keep` is a number, a share such as `11%`, or `all`; several of
    them make one bundle of all. `resume` goes on where an export of the same choices was killed.
    `progress` tells on standard error what is being done, and what it took.

    Returns the bundle's `path` and the `verdict` of the check: outputs that differ from the desktop's are a verdict
    that did not pass, not an error. Raises PruneportError of the kind that the request deserves; nothing is left behind
    then, and an existing bundle is never overwritten.
    """
    from pruneport.export.pipeline import export, stage_count
    from pruneport.export.progress import Progress, library_noise
    from pruneport.export.request import Request, plan

    planned = plan(
        Request(
            model=str(model),
            keep=str(keep) if isinstance(keep, int | str) else ",".join(map(str, keep)),
            target=str(target),
            backend=_word(backend),
            soc=_word(soc),
            min_ios=_word(min_ios),
            precision=_word(precision),
            quant_vision=_word(quant_vision),
            quant_text=_word(quant_text),
            image_size=_word(image_size),
            text_tokens=str(text_tokens),
            cut=_word(cut),
            layout=str(layout),
            method=_word(method),
            only=_word(only),
            weights=_word(weights),
            seed=str(seed),
            image=_word(image),
            calibration=_word(calibration),
            reference=str(reference),
            output_dir=str(output_dir),
            twin=twin,
            force=force,
        )
    )
    shown = Progress(stages=stage_count(planned), quiet=not progress)
    with library_noise(shown=False):
        made = export(planned, progress=shown, version=__version__, resume=resume)
    return Exported(made.bundle.path, made.verdict)


def _word(value: object) -> str | None:
    return None if value is None else str(value)


def main(argv: Sequence[str] | None = None, *, optimum: bool = False) -> int:
    """Runs the command line (with `optimum`, that of `optimum-cli export pruneport`) and returns its exit code."""
    from pruneport.export.cli import main as cli_main

    code: int = cli_main(sys.argv[1:] if argv is None else argv, version=__version__, optimum=optimum)
    return code
