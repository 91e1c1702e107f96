"""The tables of measurements, each from its file in benchmarks/results and with the command that wrote that."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peer_systems import rows as peer_rows
from docs.tables import methods
from docs.tables.markdown import code
from docs.tables.markdown import table as markdown_table

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
# The one file whose table stands in its page, where benchmarks/precision.py writes it.
ELSEWHERE = ("precision.json",)


def results(pattern: str) -> list[dict[str, Any]]:
    """Returns the result files of a pattern, in the order of their names. FileNotFoundError where there is none."""
    found = sorted(RESULTS.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no file in {RESULTS} is called {pattern}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def bundles() -> dict[str, dict[str, Any]]:
    """Returns what was measured of whole bundles, by their names in benchmarks/bundles.py."""
    (result,) = results("bundles.json")
    return {bundle["bundle"]: bundle for bundle in result["bundles"]}


def _made(*found: Mapping[str, Any]) -> str:
    """What made the table, and on what."""
    commands = ", ".join(f"`{result['command']}`" for result in found)
    where = dict.fromkeys(result.get("machine") or result["what"] for result in found)
    tools = {f"{name} {version}" for result in found for name, version in result.get("tools", {}).items()}
    with_tools = f" With {', '.join(sorted(tools))}." if tools else ""
    return f"Made by {commands}.\n\nWhere: {'; '.join(where)}.{with_tools}\n\n"


def _rows_of(script: str) -> str:
    """What a benchmark's docstring says of its rows, as a list."""
    source = (BENCHMARKS / script).read_text(encoding="utf-8")
    rows = re.findall(r"^    (\S.*?)   +(\S.*)$", ast.get_docstring(ast.parse(source)) or "", re.MULTILINE)
    return "".join(f"- **{name}**: {meaning}\n" for name, meaning in rows) + "\n"


def cost_of_pruning() -> str:
    """Returns the pruner's time beside the tower's, inside one graph."""
    found = results("pruner_overhead-*.json")
    rows = [
        (
            result["graph"].removeprefix("llava-1.5-7b vision_encoder, "),
            f"{result['median_ms']['tower']:.1f}",
            f"{result['median_ms']['pruner']:.2f}",
            f"{result['overhead_percent_of_tower']['median']:.2f}%",
            f"{result['overhead_percent_of_tower']['least']:.2f} to {result['overhead_percent_of_tower']['most']:.2f}%",
            str(result["overhead_percent_of_tower"]["runs"]),
        )
        for result in found
    ]
    heads = ("vision graph of llava-1.5-7b, keep 64", "tower, ms", "pruner, ms", "share", "least and most", "runs")
    return _made(*found) + markdown_table(heads, rows)


def gain_of_pruning() -> str:
    """Returns the default bundle beside its unpruned twin, processor by processor. Says so where none was measured."""
    parts = []
    found = results("peers.json")[0]["rows"] if (RESULTS / "peers.json").exists() else []
    for (processor, layers), group in peer_rows.groups(found).items():
        pair = peer_rows.twins(group)
        if pair is None:
            continue
        pruned, twin = pair
        table = [
            (each.name, each.unit, each.shown(twin), each.shown(pruned), f"{each.gain(pruned, twin):.2f}")
            for each in peer_rows.MEASURES
        ]
        parts += [
            f"### {processor}, {layers} of 32 layers\n\n",
            f"Made by {code(dict.fromkeys(row['command'] for row in pair))}.\n\n",
            markdown_table(("", "unit", "unpruned", "keep 64", "times better"), table),
            "".join(f"\n{sentence}.\n" for sentence in peer_rows.pruning(group)),
            "\n",
        ]
    return "".join(parts) or "Not measured yet.\n"


def on_a_gpu() -> str:
    """Returns what GPUs took for the pruner and for a prefill. Says so where none was measured yet."""
    found = results("cuda-*.json") if any(RESULTS.glob("cuda-*.json")) else []
    parts = []
    for result in (result for result in found if result["device"] == "cuda"):  # a CPU only tries the script
        prefill = result["prefill"]
        rows = [
            (
                f"{row['tokens']} to {row['keep']} tokens, {row['features']}",
                form,
                f"{ms:.3f}",
                f"{row['loop_over'][form]['median']:.2f}" if form in row["loop_over"] else "",
            )
            for row in result["pruner"]
            for form, ms in row["median_ms"].items()
        ]
        rows += [
            (
                f"prefill of {prefill['model']}, {prefill['layers']} layers, {prefill['dtype']}",
                form,
                f"{ms:.3f}",
                f"{prefill['twin_over'][form]['median']:.2f}" if form in prefill["twin_over"] else "",
            )
            for form, ms in prefill["median_ms"].items()
        ]
        parts.append(_made(result) + markdown_table(("", "form", "ms", "times faster"), rows) + "\n")
    return _rows_of("cuda.py") + ("".join(parts) or "No GPU was measured yet.\n")


def memory_of_an_export() -> str:
    """Returns what exports of the vision graph at full width took."""
    found = results("export_memory-llava-1.5-7b-*.json")
    rows = [
        (
            result["command"].split()[-1],
            f"{int(result['graph'].split()[-2]) / 1e9:.2f}",
            f"{result['stages']['trace and lower']['peak_gib']:.2f}",
            f"{max(result['peak_rss_kib'], result['peak_rss_of_loading_kib']) / 2**20:.2f}",
            f"{result['engine_median_s']:.1f}",
            f"{result['parity']['worst_rel']:g}",
            f"{result['parity']['kept_overlap']:.0%}",
        )
        for result in found
    ]
    heads = (
        "`--precision`",
        "graph file, GB",
        "peak memory up to lowering, GiB",
        "of the whole export, GiB",
        "a run on a busy desktop CPU, s",
        "largest relative error",
        "kept tokens in common",
    )
    return _made(*found) + markdown_table(heads, rows)


def whole_exports() -> str:
    """Returns what exports of whole models took, and what their bundles take to answer."""
    found = results("export_whole-*.json")
    rows = [
        (
            f"{result['model']}, {result['backend']}",
            f"{result['seconds'] / 60:.1f}",
            f"{load:.1f}" if (load := result.get("load_average")) else "",
            f"{result['peak_bytes'] / 2**30:.1f}",
            f"{result['forecast']['ram_bytes'] / 2**30:.1f}",
            f"{result['disk_peak_bytes'] / 1e9:.2f}",
            f"{result['forecast']['disk_bytes'] / 1e9:.2f}",
            f"{result['shipped_bytes'] / 1e9:.2f}",
            f"{result['starts'][-1]['resident_bytes'] / 1e9:.2f}",
            f"{result['starts'][-1]['start_s']:.1f}",
            *(
                (f"{native[-1]['resident_bytes'] / 1e9:.2f}", f"{native[-1]['start_s']:.2f}")
                if (native := result.get("native_starts"))
                else ("", "")
            ),
        )
        for result in found
    ]
    heads = (
        "model, backend",
        "export, min",
        "load",
        "peak memory, GiB",
        "forecast",
        "most disk, GB",
        "forecast",
        "files for the phone, GB",
        "answering, GB",
        "second start, s",
        "answering in the native runner, GB",
        "its second start, s",
    )
    return _made(*found) + markdown_table(heads, rows)


def part_exports() -> str:
    """Returns what exports of small models took, and how fast the machine was."""
    found = results("export_part-*.json")
    rows = [
        (
            f"{result['model']}, {result['backend']}",
            str(result["cpu_seconds"]),
            f"{result['speed']['products']:.0f}",
            f"{result['speed']['copies']:.0f}",
        )
        for result in found
    ]
    heads = ("model, backend", "processor time, s", "float32 operations, 1e9/s", "memory copied, GB/s")
    return _made(*found) + markdown_table(heads, rows)


def npu_graphs() -> str:
    """Returns which nodes the emulated NPU took, graph by graph."""
    (result,) = results("bundles.json")
    bundle = bundles()["qnn-fp16"]
    rows = [
        (graph["graph"], str(graph["operators"]), str(graph["outside"]), f"{graph['worst_rel']:g}")
        for graph in bundle["graphs"]
    ]
    return (
        _made(result)
        + f"Bundle: `{bundle['command']}`.\n\n"
        + markdown_table(("graph", "nodes on the NPU", "nodes outside", "largest relative error"), rows)
    )


def _bundles(prefix: str) -> str:
    (result,) = results("bundles.json")
    rows = [
        (
            f"`{bundle['command'].removeprefix('pruneport export ')}`",
            "passed" if bundle["passed"] else "failed",
            str(sum(graph["operators"] for graph in bundle["graphs"])),
            str(sum(graph["outside"] for graph in bundle["graphs"])),
            f"{bundle['file_bytes'] / 1e6:.1f}",
            f"{max(graph['worst_rel'] for graph in bundle['graphs']):g}",
            f"{bundle['kept_overlap']:.1%}",
            "" if bundle["answer_tokens"] is None else f"{bundle['answer_tokens_same']} of {bundle['answer_tokens']}",
        )
        for name, bundle in bundles().items()
        if name.startswith(prefix)
    ]
    heads = (
        "bundle",
        "verdict",
        "operators",
        "outside",
        "files, MB",
        "largest relative error",
        "kept tokens in common",
        "tokens of the answer as on the desktop",
    )
    return _made(result) + markdown_table(heads, rows)


def selections() -> str:
    """Returns how many golden choices the emulated NPU makes, the pruner by itself."""
    (result,) = results("qnn-emulated.json")
    measured: dict[tuple[str, str], list[float]] = {}
    for row in result["selections"]:
        measured.setdefault((row["scheme"], row["case"].rpartition("-keep")[2]), []).append(row["overlap"])
    rows = [
        (scheme, keep, str(len(shares)), str(sum(share == 1 for share in shares)), f"{min(shares):.1%}")
        for (scheme, keep), shares in measured.items()
    ]
    heads = ("layers before it", "keep", "cases", "of them equal", "least share of the kept tokens in common")
    return _made(result) + markdown_table(heads, rows)


def answers_by_delegate() -> str:
    """Returns what each delegate does to answers about ten photos."""
    (result,) = results("delegates-keep*.json")
    rows = [
        (
            row["delegate"],
            "evaluated" if not row["executed"] else "emulated" if row["emulated"] else "ran",
            f"{row['mean_kept']:.1%}",
            f"{row['mean_same']:g}",
            f"{sum(photo['same'] == 64 for photo in row['photos'])} of {len(row['photos'])}",
        )
        for row in result["delegates"]
    ]
    heads = ("delegate", "here", "kept tokens in common", "equal tokens of 64", "equal answers")
    return _made(result) + markdown_table(heads, rows)


def other_systems() -> str:
    """Returns pruneport beside what people use instead: rows, ratios, and where it loses, processor by processor.

    Says so where that was not measured yet: a machine must be quiet for it.
    """
    if not (RESULTS / "peers.json").exists():
        return "Not measured yet.\n"
    (result,) = results("peers.json")
    each_run = "`benchmarks/results/peers.json` has each run, and what other processes took meanwhile.\n\n"
    parts = [_rows_of("peers.py"), each_run]
    for (processor, layers), rows in peer_rows.groups(result["rows"]).items():
        said = {name: " and ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in ("machine", "date")}
        threads = " and ".join(dict.fromkeys(str(row["threads"]) for row in rows))
        versions = {f"{name} {text}" for row in rows for name, text in row["versions"].items()}
        sentences = (*peer_rows.losses(rows), *peer_rows.pruning(rows), *peer_rows.spending(rows))
        parts += [
            f"### {processor}, {layers} layers\n\n",
            f"Made by {code(dict.fromkeys(row['command'] for row in rows))}.\n\n",
            f"Where: {said['machine']}, {threads} threads, {said['date']}. With {', '.join(sorted(versions))}. "
            f"{peer_rows.load(rows)}\n\n",
            markdown_table(peer_rows.heads(), map(peer_rows.cells, rows)),
            "\nHow many times better than others; below 1 is worse:\n\n",
            markdown_table(peer_rows.ratio_heads(), peer_rows.ratios(rows)),
            "\n",
            "".join(f"- {sentence}.\n" for sentence in sentences),
            "\n",
        ]
    return "".join(parts)


def kept_tokens() -> str:
    """Returns what quantising tower and layers does to the kept tokens."""
    (result,) = results("kept_tokens.json")
    rows = [
        (
            row["tower"],
            row["attention"],
            row["rest"],
            f"{row['keys']:.2g}",
            f"{min(row['kept']):.0%}",
            f"{sum(row['kept']) / len(row['kept']):.0%}",
        )
        for row in result["rows"]
    ]
    header = ("tower", "attention below the cut", "rest of these layers", "keys", "kept, worst", "kept, mean")
    return _made(result) + markdown_table(header, rows)


def _share(part: Mapping[str, float]) -> str:
    return f"{100 * part['value']:.1f} ({100 * part['low']:.1f} to {100 * part['high']:.1f})"


def _measured(name: str) -> dict[str, Any] | None:
    """A result of one file, None where it was not measured yet."""
    return results(name)[0] if (RESULTS / name).exists() else None


def accuracy_by_method() -> str:
    """Returns what each method at each keep leaves of pocket's right answers. Says so where that was not measured."""
    if (result := _measured("eval-pocket.json")) is None:
        return "Not measured yet.\n"
    asked = result["questions"]
    (whole, *pruned) = result["rows"]
    keeps = sorted({row["keep"] for row in pruned}, reverse=True)
    known = methods.named()
    names = dict.fromkeys(row["name"] for row in pruned if row["name"] in known)
    found = {(row["name"], row["keep"]): _share(row["accuracy"]) for row in pruned}
    table = [(f"`{name}`", *(found.get((name, keep), "") for keep in keeps)) for name in names]
    return (
        f"Made by `{result['command']}`, from {asked['count']} questions about {asked['photos']} pictures. "
        "Right answers in %, "
        f"with 95 % intervals; the unpruned model with {whole['keep']} tokens: {_share(whole['accuracy'])}.\n\n"
        + markdown_table(("method", *(f"keep {keep}" for keep in keeps)), table)
    )


def accuracy_of_bundles() -> str:
    """Returns what bundles answer beside the desktop model with the same tokens kept. Says so where no one asked."""
    if (result := _measured("eval-pocket.json")) is None:
        return "Not measured yet.\n"
    known = methods.named()
    asked = [row for row in result["rows"] if row["name"] in (*known, "unpruned")]
    rows = [
        (f"`{row['name']}`", _share(row["accuracy"]), *(_share(own["accuracy"]) for own in asked if _same(own, row)))
        for row in result["rows"]
        if row not in asked
    ]
    return markdown_table(("bundle", "right answers, %", "of the desktop model, %"), rows)


def _same(desktop: Mapping[str, Any], bundle: Mapping[str, Any]) -> bool:
    """Whether both keep as many tokens in front of the same layer, VLM-Pruner's or all."""
    return desktop["name"] in ("vlm-pruner", "unpruned") and all(desktop[key] == bundle[key] for key in ("keep", "cut"))


def other_tokens() -> str:
    """Returns what it costs in answers that other tokens are kept than should be. Says so where no one asked."""
    if (result := _measured("kept_overlap.json")) is None:
        return "Not measured yet.\n"
    rows = [
        (str(row["keep"]), f"{row['overlap']:.1%}", _share(row["accuracy"]), _share(row["loss"]))
        for row in result["rows"]
    ]
    return _made(result) + markdown_table(("keep", "tokens in common", "right answers, %", "lost, %"), rows)


def own_methods() -> str:
    """Returns what was tried for a method of our own, by the answers that it leaves. Says so where no one asked."""
    if (result := _measured("own_methods.json")) is None:
        return "Not measured yet.\n"
    rows = [
        (
            row["method"],
            str(row["keep"]),
            _share(row["accuracy"]),
            _share(row["loss"]),
            "" if row["gain"] is None else _share(row["gain"]),
        )
        for row in result["rows"]
    ]
    heads = ("tokens by", "keep", "right answers, %", "lost, %", "more than VLM-Pruner's, %")
    return _made(result) + markdown_table(heads, rows)


def training_curve() -> str:
    """Returns how pocket's last stages went: the first, each fifth and the last mean of a stage, and what came out."""
    if (result := _measured("training.json")) is None:
        return "Not measured yet.\n"
    rows = []
    for stage in result["stages"]:
        *before, last = stage["rows"]
        came_out = stage.get("held_out", {})
        for number, row in enumerate([*before[::5], last]):
            known = came_out if row is last else {}
            rows.append(
                (
                    "" if number else stage["name"],
                    str(row["step"]),
                    f"{row['loss']:.2f}",
                    f"{row['right']:.1%}",
                    *(f"{known[name]:.1%}" if name in known else "" for name in ("all", "shape", "count")),
                )
            )
    heads = ("stage", "step", "loss", "answers' tokens right", "held out: all", "shape", "count")
    return _made(result) + markdown_table(heads, rows)


def accuracy_by_category() -> str:
    """Returns the same by what is asked, unpruned and by each method at 64 tokens. Says so where no one asked."""
    if (result := _measured("eval-pocket.json")) is None:
        return "Not measured yet.\n"
    known = methods.named()
    rows = [row for row in result["rows"] if row["name"] == "unpruned" or (row["name"] in known and row["keep"] == 64)]
    names = list(result["rows"][0]["categories"])
    table = [
        (
            row["name"] if row["cut"] is None else f"`{row['name']}`",
            str(row["keep"]),
            *(f"{100 * row['categories'][name]['value']:.1f}" for name in names),
        )
        for row in rows
    ]
    return markdown_table(("method", "keep", *names), table)


PARTS: Mapping[str, Callable[[], str]] = {
    "cost of pruning": cost_of_pruning,
    "gain of pruning": gain_of_pruning,
    "other systems": other_systems,
    "on a GPU": on_a_gpu,
    "memory of an export": memory_of_an_export,
    "whole exports": whole_exports,
    "part exports": part_exports,
    "graphs on the NPU": npu_graphs,
    "bundles for the NPU": partial(_bundles, "qnn"),
    "bundles for Core ML": partial(_bundles, "coreml"),
    "selections on the NPU": selections,
    "answers by delegate": answers_by_delegate,
    "kept tokens by scheme": kept_tokens,
    "accuracy by method": accuracy_by_method,
    "accuracy by category": accuracy_by_category,
    "accuracy of bundles": accuracy_of_bundles,
    "other tokens": other_tokens,
    "tried methods": own_methods,
    "curve of the training": training_curve,
}
