"""The backends of each target and what they can be asked for, from the declarations that exports are made by."""

from __future__ import annotations

from docs.tables.markdown import code
from docs.tables.markdown import table as markdown_table
from export.targets import TARGETS, Backend

# The extra that brings the engine for `pruneport verify`, by the module that the backend needs for it.
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
        ("`--precision`", f"{code(backend.precisions)}; the first is the default"),
        ("`--quant-vision`", code(backend.quant_vision)),
        ("`--quant-text`", code(backend.quant_text) + ("; the first is the default" if backend.quant_text else "")),
        ("packages that an export needs", code(backend.packages)),
    ]
    if backend.ready_made is not None:
        rows.append(
            (
                "ready-made runtime",
                f"{backend.ready_made.runtime}; `--quant-text` {code(backend.ready_made.quant_text)}",
            )
        )
    if backend.min_ios is not None:
        rows.append(("oldest iOS", str(backend.min_ios)))
    if backend.most_graph_bytes is not None:
        rows.append(("weights of one graph at most", f"{(backend.most_graph_bytes + 1) / 2**30:g} GiB"))
    return markdown_table(("choice", "values"), rows)
