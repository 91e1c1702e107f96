"""The backends of each target and what they can be asked for, from the declarations that exports are made by."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import code
from docs.tables.markdown import table as markdown_table
from export.backends.backend import Backend
from export.targets import LAYOUTS, TARGETS

# What their makers call them.
ENGINES = {"executorch": "ExecuTorch", "onnxruntime": "ONNX Runtime", "coreml": "Core ML"}

BACKENDS: dict[str, tuple[str, Backend]] = {
    backend.name: (target.name, backend) for target in TARGETS.values() for backend in target.backends
}


def page_of(name: str) -> str:
    """Returns the file of a backend's page."""
    return {"executorch": "executorch-coreml.md"}.get(name, f"{name}.md")


def table() -> str:
    """Returns a row for each backend: its target, its engine, its precisions and schemes, defaults first."""
    rows = [
        (
            f"[`{name}`]({page_of(name)})",
            f"`{target}`",
            ENGINES[backend.engine],
            code(backend.precisions),
            code(backend.quant_vision),
            code(backend.quant_text),
        )
        for name, (target, backend) in BACKENDS.items()
    ]
    heads = ("`--backend`", "`--target`", "engine", "`--precision`", "`--quant-vision`", "`--quant-text`")
    return markdown_table(heads, rows)


def choices(name: str) -> str:
    """Returns what one backend can be asked for."""
    target, backend = BACKENDS[name]
    rows = [
        ("chosen with", f"`--target {target} --backend {name}`"),
        ("engine", ENGINES[backend.engine]),
        ("`--precision`", _first_is_default(backend.precisions)),
        ("`--quant-vision`", code(backend.quant_vision)),
        ("`--quant-text`", _first_is_default(backend.quant_text)),
        ("packages that an export needs", code(backend.packages)),
    ]
    if backend.variants is not None:
        flag = backend.variants.flag.replace("_", "-")
        default = backend.variants.default
        rows.append(
            (f"`--{flag}`", code(backend.variants.known()) + (f"; `{default}` is the default" if default else ""))
        )
    for layout in LAYOUTS.values():
        if layout.backend is backend:
            rows.append(("`--layout`", f"`{layout.runtime}`, with `--quant-text` {code(layout.quant_text)}"))
    if backend.most_positions is not None:
        rows.append(("positions at most", str(backend.most_positions)))
    if backend.most_graph_bytes is not None:
        rows.append(("weights of one graph at most", f"{(backend.most_graph_bytes + 1) / 2**30:g} GiB"))
    return markdown_table(("choice", "values"), rows)


def _first_is_default(words: Sequence[str]) -> str:
    return code(words) + ("; the first is the default" if len(words) > 1 else "")
