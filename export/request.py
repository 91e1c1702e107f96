"""Turns what was asked for (strings) into a Plan (objects): every name, number and path is refused here or nowhere."""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from export.calibration import default_photos, read_photos, sample_paths
from export.share import is_share, read_share
from runtime.errors import ExportError, ImageError, NotYetError, OutputError, PruneportError, RequestError
from runtime.names import is_text, stored_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.backends.backend import Backend, Precision, Recipe
    from export.dropin.layout import Layout
    from export.families.family import ModelEntry
    from export.targets import Target
    from pruning import PruneSpec

Word = TypeVar("Word", bound=str)
NONE = "none"
# The model that `--weights` describes.
AUTO = "auto"
# Of an image's edge, in the manifest.
MOST_PIXELS = 8192
# What a layout is called that no runtime of other people takes.
OWN = "pruneport"
# The paper prunes in front of decoder layer K = 2 (section 3): layers 0 and 1 see every image token.
PAPER_CUT = 2

# Who chooses the tokens where nobody says it: the paper's method.
DEFAULT_METHOD = "vlm-pruner"

# Shipped with packages the exporter needs anyway; the first that is installed is the photo of a check without --image.
DEFAULT_PHOTOS = (("sklearn", "datasets/images/china.jpg"), ("skimage", "data/astronaut.png"))

# Peak memory of an export: the libraries, plus the weights held about three times over while a graph is serialised and
# again when the engine has loaded and packed it. Quantised text weights take a byte each while they wait, another while
# one graph is lowered, and what the graph packed.
BASE_RAM_BYTES = 1200 * 2**20
RAM_PER_GRAPH_BYTE = 3.1
RAM_PER_QUANTISED_WEIGHT = 2.6
# Where weights are read as they are packed, the largest one sets the peak of lowering: read, in float32, quantised
# (benchmarks/results/export_memory-*.json).
RAM_PER_LARGEST_WEIGHT = 12
# Tokens of a layer whose keys and values the check holds beside the weights: cache, golden, outputs.
_TOKENS_IN_CHECK = 1100
# A number of the token embedding in 8 bits, with its share of a scale in 32 bits for each 32.
_BYTES_PER_ROW_NUMBER = 1.125
# All here was measured at so many image tokens. Where there are more, these matrices over pairs of them, counted and
# not measured, come on top: for each head a layer's scores, masked, and behind the softmax; and the pruner's own.
_MEASURED_TOKENS = 576
_SCORES, _PRUNER_MATRICES = 3, 12
# Golden tensors, reports and the photo beside the graphs, for each keep; all that several keeps do not share.
KEEP_EXTRA_BYTES = 64 * 2**20
# A sentence of them, and a folder's name, hold so many.
MOST_KEEPS = 8

GOLDEN_FILE = "golden.safetensors"

PARTS = ("vision", "text")
# What can be exported without the rest.
ALONE = ("vision",)

# Room for text in the KV cache. The least is what the check needs: a prompt chunk, or a question and its answer.
DEFAULT_TEXT_TOKENS = 512
LEAST_TEXT_TOKENS = 192


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for, word by word; `plan` gives the words a meaning."""

    model: str
    keep: str
    target: str
    backend: str | None = None
    soc: str | None = None
    min_ios: str | None = None
    precision: str | None = None
    quant_vision: str | None = None
    quant_text: str | None = None
    image_size: str | None = None
    text_tokens: str = str(DEFAULT_TEXT_TOKENS)
    cut: str | None = None
    layout: str = OWN
    method: str | None = None
    only: str | None = None
    weights: str | None = None
    seed: str = "0"
    image: str | None = None
    calibration: str | None = None
    reference: str = "auto"
    output_dir: str = "bundles"
    twin: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class KeepPlan:
    """One keep of a bundle, the vision graph and the golden file that are its own; `spec` None prunes nothing."""

    keep: int
    spec: PruneSpec | None
    graph: str
    golden: str


@dataclass(frozen=True, kw_only=True)
class BundlePlan:
    """One bundle to make, at one or several keeps, the default first."""

    path: Path
    keeps: tuple[KeepPlan, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> PruneSpec | None:
        """How it prunes by default; None for not at all."""
        return self.keeps[0].spec

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of its vision graphs."""
        return tuple(each.graph for each in self.keeps)

    @property
    def words(self) -> str:
        """Its keeps in words."""
        counts = ", ".join(str(each.keep) for each in self.keeps)
        return f"keep {counts}" if len(self.keeps) > 1 or self.spec else "unpruned"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an export takes from the machine, and what the machine has, in bytes."""

    ram_bytes: int
    ram_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An export with every name resolved; `twin` is made first, in the same run, and compared with `bundle`.

    `vision` and `text` say how the two parts are made and by which backend, `layout` for whose runtime; `text` is None
    where no text graphs are made, and so is `text_tokens`, the room for text in the KV cache. `calibration` are the
    photos that the vision graph's quantisation is measured on, None where it needs none.
    """

    request: Request
    entry: ModelEntry
    target: Target
    vision: Recipe
    text: Recipe | None
    text_tokens: int | None
    cut: int
    layout: Layout | None
    weights: str | None
    seed: int
    photo_path: Path
    photo: NDArray[np.uint8]
    calibration: Mapping[str, NDArray[np.uint8]] | None
    bundle: BundlePlan
    twin: BundlePlan | None
    needs: Needs

    @property
    def photo_name(self) -> str:
        """The photo's name as the manifest and the reports can hold it."""
        return stored_name(self.photo_path)

    @property
    def framed(self) -> bool:
        """True where the vision graph hands on the prompt before the image, too: our text graphs take both."""
        return self.cut > 0 or (self.text is not None and self.layout is None)

    @property
    def parts(self) -> Mapping[str, Recipe]:
        """How each part that is made is made, by its name."""
        return {"vision": self.vision} | ({"text": self.text} if self.text is not None else {})

    @property
    def mixed(self) -> bool:
        """True where the parts are made by different backends, each with files and weights of its own."""
        return self.text is not None and self.text.backend.name != self.vision.backend.name

    @property
    def shared_scheme(self) -> str | None:
        """What quantises the decoder layers below the cut with the text graphs, whose weights they share.

        None where nothing does, and where another backend makes the text graphs: these layers are then made as the rest
        of the vision graph.
        """
        return None if self.text is None or self.mixed else self.text.module_scheme

    @property
    def cache(self) -> str | None:
        """The dtype of the KV cache. The text graphs decide it, and the vision graph hands on what they take."""
        return None if self.text is None else "float16" if self.text.traced == "fp16" else "float32"

    @property
    def index(self) -> str | None:
        """The dtype of the positions that are handed on: between two engines int32, which all have; else its own."""
        return "int32" if self.mixed else None

    def sees(self, graph: str) -> bool:
        """Whether a graph is a vision graph."""
        return any(graph in bundle.graphs for bundle in self.bundles)

    def recipe(self, graph: str) -> Recipe:
        """How a graph is made: as its part, but that the token embedding, a table of rows, has a scheme of its own."""
        from runtime.ready_made import EMBED_TOKENS
        from runtime.text_graphs import TOKEN_EMBEDDING

        if self.sees(graph) or self.text is None:
            return self.vision
        if graph not in (TOKEN_EMBEDDING, EMBED_TOKENS):
            return self.text
        rows = self.text.backend.quant_rows if self.text.scheme and self.layout is None else None
        return replace(self.text.unquantised, scheme=rows, packed="before tracing" if rows else "while lowering")

    def arithmetic(self, graph: str) -> tuple[str, ...]:
        """What a graph's numbers pass through: decoder layers below the cut may be made as the text graphs' are."""
        from export.quantize import schemes_below_cut
        from runtime.text_graphs import DECODER_FRONT, TEXT_DECODER, TEXT_PREFILL

        named = [self.recipe(graph).arithmetic]
        if self.sees(graph) and self.cut:
            if self.shared_scheme:
                named += schemes_below_cut(self.shared_scheme)
            if self.cache == "float16" and self.vision.traced == "fp32":  # keys and values are rounded as they leave
                named.append("fp16")
        quant = self.text.module_scheme if self.text and self.cut else None
        if quant and graph == DECODER_FRONT:
            named = [*schemes_below_cut(quant)]
        if quant and graph in (TEXT_PREFILL, TEXT_DECODER):
            named += schemes_below_cut(quant)
        return tuple(dict.fromkeys(named))

    @property
    def states(self) -> bool:
        """Whether the engine keeps the KV cache: its states are float16."""
        return self.text is not None and self.text.backend.states and self.text.in_half

    @property
    def bundles(self) -> tuple[BundlePlan, ...]:
        return (self.bundle,) if self.twin is None else (self.twin, self.bundle)


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean ...?` where a known word is near, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def plan(request: Request) -> Plan:
    """Resolves every name, number and path of a request.

    Raises:
        RequestError: a word or number that means nothing here.
        NotYetError: something later versions will do.
        OutputError: the bundle exists, or its folder cannot be written or is too full.
        ImageError: the photo cannot be read.
        ExportError: the packages that make graphs are not installed.
    """
    from export.targets import TARGETS
    from runtime.bundle import VISION_ENCODER, of_keep

    entry = _at_size(model_entry(request.model, request.weights), request.image_size)
    target = TARGETS[known_word("target", request.target, TARGETS)]
    if request.only is not None:
        known_word("part", request.only, ALONE)
    whole = request.only is None
    backends = _backends(request, target, PARTS if request.only is None else (request.only,))
    backend, text_backend = backends["vision"], backends.get("text", backends["vision"])
    mixed = text_backend is not backend
    _check_tried(entry, backends.values(), target)
    layout = _layout(request.layout, backends, target, entry)
    cut = _cut(request.cut, entry, layout)
    schemes = layout.quant_text if layout else text_backend.quant_text
    fitting = (scheme for scheme in schemes if not _odd_layers(entry, scheme, _DECODER))
    default_quant_text = entry.quant_text or next(fitting, NONE)
    quant_text = None
    if whole:
        wanted = request.quant_text or default_quant_text
        if layout and wanted in text_backend.quant_text and wanted not in (*schemes, NONE):
            raise RequestError(
                f"quant_text={wanted} does not go with layout={layout.runtime}, which takes {', '.join(schemes)}"
            )
        quant_text = _quantisation("quant_text", wanted, schemes, text_backend, target)
    elif request.quant_text is not None:
        raise RequestError(f"quant_text={request.quant_text} has nothing to quantise: no text graphs are made here")
    asked = _precisions(request.precision, backends)
    default_quant_vision = None
    if quant_text and not mixed and layout is None and asked["vision"] is None:
        default_quant_vision = backend.quant_vision_with_text
        if default_quant_vision and _odd_layers(entry, default_quant_vision):
            default_quant_vision = None
    scheme = request.quant_vision or default_quant_vision
    if layout and scheme in backend.quant_vision and scheme not in layout.quant_vision:
        raise RequestError(
            f"quant_vision={scheme} does not go with layout={layout.runtime}, which takes "
            f"{', '.join((*layout.quant_vision, NONE))}; leave --quant-vision out"
        )
    quant_vision = _quantisation("quant_vision", scheme, backend.quant_vision, backend, target)
    if quant_vision and (odd := _odd_layers(entry, quant_vision)):
        raise RequestError(
            f"quant_vision={quant_vision} has one scale for each group of a layer's inputs, and {odd[0]} of "
            f"{entry.name} does not divide into such groups; leave --quant-vision out, or take --backend xnnpack "
            "--quant-vision 8da8w, which has a scale for each output"
        )
    all_quantised = not backend.compresses and bool(quant_vision) and (not whole or mixed or bool(quant_text))
    default_precision = "fp32" if all_quantised else _usual_precision(entry, backend)
    precision = known_word(f"{backend.name} precision", asked["vision"] or default_precision, backend.precisions)
    if all_quantised and precision != "fp32":
        raise RequestError(
            f"precision={precision} does not go with quant_vision={quant_vision}: {backend.name} quantises only "
            "what comes in fp32, and computes the rest in fp32; leave --precision or --quant-vision out"
        )
    text_precision, default_text_precision = precision, precision
    if mixed:
        default_text_precision = _usual_precision(entry, text_backend)
        wanted = asked["text"] or default_text_precision
        text_precision = known_word(f"{text_backend.name} precision", wanted, text_backend.precisions)
    text_tokens = _text_tokens(request.text_tokens, entry) if whole else None
    tokens = entry.geometry.image_tokens
    keeps = _keeps(request.keep, tokens, entry.name)
    if len(keeps) > 1:
        _check_takes_keeps(request.keep, backends, layout)
    seed = whole_number("seed", request.seed, 0, 2**32 - 1)
    if request.twin and tokens in keeps:
        raise RequestError(f"keep={request.keep} makes the unpruned twin itself; leave --twin out")
    _check_size(VISION_ENCODER, entry.vision_parameter_count(cut), backend, entry, precision)
    if whole:
        _check_size("text_prefill", entry.text_parameter_count(), text_backend, entry, text_precision)
    _check_weights(request.weights)
    for each in dict.fromkeys((backend, text_backend)):
        _check_installed(each)
    _check_reference(request.reference)
    method = _method(request.method, cut, entry, backend, pruned=min(keeps) < tokens)
    photo_path = _photo_path(request.image)
    calibration = _calibration(request.calibration, backend, quant_vision)

    choices = [
        backend.variant,
        text_backend.variant if mixed else "",
        precision if precision != default_precision else "",
        "" if quant_vision == default_quant_vision else quant_vision or f"vision-{NONE}",
        f"text-{text_precision}" if text_precision != default_text_precision else "",
        f"text-{quant_text or NONE}" if whole and (quant_text or NONE) != default_quant_text else "",
        "" if request.image_size is None else "image{}x{}".format(*_image_size(request.image_size)),
        f"text{text_tokens}" if text_tokens not in (None, DEFAULT_TEXT_TOKENS) else "",
        f"cut{cut}" if cut != paper_cut(entry.geometry.least_cut) and layout is None else "",
        layout.runtime if layout else "",
        request.only or "",
        "random" if request.weights == "random" else "",
    ]
    if not is_text(request.output_dir):
        raise RequestError(
            f"output_dir={request.output_dir} has a name that is not in UTF-8, which converters and engines cannot "
            "open; choose another output folder"
        )
    folder = Path(request.output_dir)

    def bundle_plan(keeps: Sequence[int]) -> BundlePlan:
        kept = "keep" + "-".join(str(keep) if keep < tokens else "all" for keep in keeps)
        by = method if min(keeps) < tokens and request.method not in (None, DEFAULT_METHOD) else ""
        made_by = f"vision-{backend.name}-text-{text_backend.name}" if mixed else backend.name
        parts = (entry.name, kept, target.name, made_by, *(choice for choice in (by, *choices) if choice))
        return BundlePlan(
            path=folder / "-".join(parts),
            keeps=tuple(
                KeepPlan(
                    keep=keep,
                    spec=_prune_spec(entry, keep, method) if keep < tokens else None,
                    graph=VISION_ENCODER if len(keeps) == 1 else f"{VISION_ENCODER}_keep{keep}",
                    golden=GOLDEN_FILE if len(keeps) == 1 else of_keep(GOLDEN_FILE, keep),
                )
                for keep in keeps
            ),
        )

    bundle = bundle_plan(keeps)
    twin = bundle_plan([tokens]) if request.twin else None
    for path in (bundle.path, *([twin.path] if twin else [])):
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path} exists and is not overwritten; move it away or choose another output folder")
    needs = _needs(
        entry,
        cut,
        precision,
        text=whole,
        quant_vision=quant_vision,
        quant_text=quant_text,
        text_precision=text_precision,
        backend=backend,
        text_backend=text_backend,
        bundles=2 if twin else 1,
        goldens=len(keeps) + (1 if twin else 0),
        folder=folder,
    )
    if needs.disk_bytes > needs.disk_free_bytes and not request.force:
        raise OutputError(
            f"{folder} has {_gib(needs.disk_free_bytes)} free, the export needs about {_gib(needs.disk_bytes)}; "
            "free some space (`pruneport clean` removes what killed exports left), choose another output folder, or "
            "try it all the same with --force"
        )
    from runtime.image import load_photo

    return Plan(
        request=request,
        entry=entry,
        target=target,
        vision=backend.recipe(precision, quant_vision),
        text=text_backend.recipe(text_precision, quant_text) if whole else None,
        text_tokens=text_tokens,
        cut=cut,
        layout=layout,
        weights=request.weights,
        seed=seed,
        photo_path=photo_path,
        photo=load_photo(photo_path),
        calibration=calibration,
        bundle=bundle,
        twin=twin,
        needs=needs,
    )


def describe(plan: Plan) -> str:
    """What the plan will make, from what, and what it needs, as a few lines of text."""
    tokens = plan.entry.geometry.image_tokens
    spec = next((each.spec for each in plan.bundle.keeps if each.spec), None)
    where = f"before decoder layer {plan.cut}" if plan.cut else "after the projector"
    counts = " or ".join(str(each.keep) for each in plan.bundle.keeps)
    kept = f"{counts} of {tokens} image tokens kept {where}" if spec else f"all {tokens} image tokens, not pruned"
    kept += f", chosen by {spec.method}" if spec else ""
    kept += f"; {len(plan.bundle.keeps)} graphs over the same weights" if len(plan.bundle.keeps) > 1 else ""
    schemes = [f"{part} {recipe.scheme}" for part, recipe in plan.parts.items() if recipe.scheme]
    makers = _maker(plan.vision, *schemes)
    if plan.mixed:
        makers = "; ".join(f"{part} {_maker(recipe, recipe.scheme or '')}" for part, recipe in plan.parts.items())
    text = "none"
    if plan.text is not None:
        fixed = "image_prefill, token_embedding, text_prefill, text_decoder"
        front = "decoder_front, " if plan.cut else ""
        names = f"token_embedding, {front}decoder_back, lm_head" if plan.text.backend.open_axes else fixed
        text = f"{names}; room for {plan.text_tokens} tokens"
        if plan.text.backend.states:
            text += ", KV cache as states" if plan.states else ", KV cache as inputs and outputs (states are fp16)"
        elif plan.text.backend.text_copies > 1:
            text += ", KV cache as inputs and outputs, weights stored for each graph"
        if plan.layout:
            text = f"as {plan.layout.runtime} expects it; room for {plan.text_tokens} tokens"
    if plan.weights == "random":
        weights = f"random, seed {plan.seed} (true geometry, meaningless answers)"
    else:
        weights = plan.weights or plan.entry.hub_id or "come with pruneport"
        if plan.weights is None and plan.entry.hub_id:
            weights = f"local hub cache, else the hub: {weights}"
    height, width = plan.photo.shape[:2]
    needs = plan.needs
    lines = [
        f"{plan.entry.name}: {plan.entry.summary}",
        f"  makes    {plan.bundle.path}",
        *([f"           {plan.twin.path} (unpruned twin)"] if plan.twin else []),
        f"  vision   vision_encoder, {kept}",
        f"  text     {text}",
        f"  target   {plan.target.name}, {makers}",
        f"  weights  {weights}",
        f"  photo    {plan.photo_name}, {width} x {height}",
        *([] if plan.calibration is None else [f"  ranges   from {len(plan.calibration)} photos"]),
        f"  needs    RAM about {_gib(needs.ram_bytes)} ({_gib(needs.ram_available_bytes)} available), "
        f"disk about {_gib(needs.disk_bytes)} ({_gib(needs.disk_free_bytes)} free), {_time_words(plan)}",
    ]
    if needs.ram_bytes > needs.ram_available_bytes:
        lines.append(
            "  warning  more RAM is needed than is available; "
            + ("the system may stop the export" if plan.request.force else "an export is refused without --force")
        )
    return "\n".join(lines)


def needed_seconds(plan: Plan) -> float | None:
    """How long the export takes on this machine, as far as whole bundles of one backend were measured; else None."""
    from export.duration import forecast_seconds

    if plan.mixed or plan.layout is not None or plan.text is None:
        return None
    weights = plan.entry.vision_parameter_count(0) + plan.entry.text_parameter_count()
    quantised = plan.text.scheme is not None
    return forecast_seconds(plan.vision.backend.name, weights, quantised=quantised, bundles=len(plan.bundles))


def _time_words(plan: Plan) -> str:
    seconds = needed_seconds(plan)
    if seconds is None:
        return "no forecast of time"
    return f"about {max(1, round(seconds / 60))} min of a machine that does nothing else"


def _maker(recipe: Recipe, *schemes: str) -> str:
    """Who makes a part, in what and for what."""
    backend = recipe.backend
    made_for = f"for {backend.made_for}" if backend.made_for else ""
    return ", ".join(filter(None, (f"{backend.name} ({backend.engine})", recipe.precision, *schemes, made_for)))


def check_memory(planned: Plan) -> None:
    """Refuses an export that the system would stop half-way for want of memory; RequestError says what needs less."""
    needs, request = planned.needs, planned.request
    if request.force or needs.ram_bytes <= needs.ram_available_bytes:
        return
    vision = replace(request, only="vision", quant_text=None, backend=planned.vision.backend.name)
    alone = f"--only vision --backend {planned.vision.backend.name}" if planned.mixed else "--only vision"
    text = planned.text or planned.vision
    others = {
        "--precision fp16": replace(request, precision="fp16"),
        **{f"--quant-text {name}": replace(request, quant_text=name) for name in text.backend.quant_text[:1]},
        alone: vision,
        f"--cut 0 {alone}": replace(vision, cut="0", layout=OWN),
    }
    less = []
    for words, other in others.items():
        try:
            ram_bytes = plan(other).needs.ram_bytes
        except PruneportError:  # this backend has no such thing
            continue
        if ram_bytes < needs.ram_bytes:
            less.append(f"{words} (about {_gib(ram_bytes)})")
    ways_out = f"less is needed with {', '.join(less)}; or " if less else ""
    raise RequestError(
        f"the export needs about {_gib(needs.ram_bytes)} of RAM, {_gib(needs.ram_available_bytes)} are available, and "
        f"the system would stop it half-way; {ways_out}close other programs, take a larger machine, or try it all the "
        "same with --force"
    )


def model_entry(word: str, weights: str | None) -> ModelEntry:
    """The model that `word` names: of the table, or by `auto` the one that the folder `weights` describes."""
    from export.families import MODELS

    if word != AUTO:
        return MODELS[known_word("model", word, (*MODELS, AUTO))]
    from export.checkpoints import RANDOM, entry_of_folder

    if weights is None or weights == RANDOM:
        raise RequestError(f"model={AUTO} is what the config.json of a folder describes; give it with --weights DIR")
    _check_weights(weights)
    return entry_of_folder(Path(weights))


def _at_size(entry: ModelEntry, words: str | None) -> ModelEntry:
    """The model for images of another size: `N`, or `HxW`, in pixels. RequestError where it takes one size alone."""
    if words is None:
        return entry
    resized = replace(entry, family=entry.family.resized(_image_size(words)))
    _ = resized.geometry  # refuses what does not divide
    return resized


def _image_size(words: str) -> tuple[int, int]:
    """Height and width."""
    edges = words.lower().split("x")
    if len(edges) > 2:
        raise RequestError(f"image_size={words[:20]!r} is no size; write N, or HxW, such as 448x672")
    height, width = (whole_number("image_size", edge, 1, MOST_PIXELS) for edge in (edges[0], edges[-1]))
    return height, width


def known_word(what: str, word: str, known: Iterable[Word]) -> Word:
    names = list(known)
    if word not in names:
        raise RequestError(f"unknown {what} {word!r}{nearest(word, names)}; allowed: {', '.join(names)}")
    return names[names.index(word)]


def _by_part(what: str, word: str, parts: tuple[str, ...]) -> dict[str, str]:
    """What a word says of each part that is made: one word of all of them, or `vision=...,text=...`."""
    if not {"=", ","} & set(word):
        return dict.fromkeys(parts, word)
    form = ",".join(f"{part}=..." for part in parts)
    said: dict[str, str] = {}
    for piece in word.split(","):
        part, _, value = piece.partition("=")
        if not part or not value:
            raise RequestError(f"{what}={word!r} has no part or no name in {piece!r}; write {form}, or one word")
        known_word("part", part, PARTS)
        if part not in parts:
            raise RequestError(f"{what}={word!r} names the {part} graphs, which --only leaves out; write {form}")
        if part in said:
            raise RequestError(f"{what}={word!r} names {part} twice; write {form}")
        said[part] = value
    if missing := [part for part in parts if part not in said]:
        raise RequestError(f"{what}={word!r} says nothing of {', '.join(missing)}; write {form}, or one word for all")
    return said


def _backends(request: Request, target: Target, parts: tuple[str, ...]) -> dict[str, Backend]:
    """Who makes each part: one and the same object where one backend makes all."""
    known = {backend.name: backend for backend in target.backends}
    named = _by_part("backend", request.backend or next(iter(known)), parts)
    for name in named.values():
        known_word(f"{target.name} backend", name, known)
    names = list(dict.fromkeys(named.values()))
    for flag, word in (("soc", request.soc), ("min_ios", request.min_ios)):
        if word is not None and flag not in [variants.flag for name in names if (variants := known[name].variants)]:
            raise RequestError(
                f"{flag}={word} means nothing to backend {' or '.join(names)} of target {target.name}; leave "
                f"--{flag.replace('_', '-')} out"
            )
    made = {name: _variant(request, known[name], [part for part in parts if named[part] == name]) for name in names}
    return {part: made[name] for part, name in named.items()}


def _precisions(word: str | None, backends: Mapping[str, Backend]) -> Mapping[str, str | None]:
    """The precision that was asked for each part, None where none was."""
    if word is None:
        return dict.fromkeys(backends)
    said = _by_part("precision", word, tuple(backends))
    names = {backend.name for backend in backends.values()}
    if len(names) == 1 < len(set(said.values())):
        raise RequestError(
            f"precision={word!r} names two precisions, but backend {names.pop()} makes both parts in one; write one "
            "word, or give the parts different backends"
        )
    return said


def _usual_precision(entry: ModelEntry, backend: Backend) -> Precision:
    return entry.precision if entry.precision in backend.precisions else backend.precisions[0]


def _variant(request: Request, backend: Backend, parts: Iterable[str]) -> Backend:
    """The backend as it makes graphs for the chip or system that was asked for; it must have its parts' schemes."""
    variants = backend.variants
    if variants is None:
        return backend
    flag, known = variants.flag, variants.known()
    word = request.soc if flag == "soc" else request.min_ios
    if word is None and variants.default is None:
        raise RequestError(f"backend {backend.name} {variants.why}; name it with --{flag}: {', '.join(known)}")
    name = known_word(flag, word or variants.default or "", known)
    chosen = known[name]
    for what in (f"quant_{part}" for part in parts):
        scheme, had = getattr(request, what), getattr(chosen, what)
        others = [other for other, made in known.items() if scheme in getattr(made, what)]
        if others and scheme not in had:
            raise RequestError(
                f"{what}={scheme} is not made for {flag}={name}; take {', '.join((*had, NONE))}, or "
                f"--{flag.replace('_', '-')} {others[0]}"
            )
    return chosen


def _quantisation(
    what: str, word: str | None, schemes: tuple[str, ...], backend: Backend, target: Target
) -> str | None:
    """The scheme that `word` names, None for none."""
    if word is None or word == NONE:
        return None
    if not schemes:
        others = [other.name for other in target.backends if getattr(other, what)]
        flag = what.replace("_", "-")
        raise NotYetError(
            f"{what}={word}: not yet on backend {backend.name}; "
            f"leave --{flag} out, or take a backend that has it: {', '.join(others) or 'none yet'}"
        )
    return known_word(f"{backend.name} {what}", word, dict.fromkeys((*schemes, NONE)))


def _check_tried(entry: ModelEntry, backends: Iterable[Backend], target: Target) -> None:
    """Refuses a backend that nobody has seen take the graphs of a model's family."""
    tried = entry.family.backends
    if tried is None:
        return
    untried = [backend.name for backend in backends if backend.name not in tried]
    if not untried:
        return
    here = [backend.name for backend in target.backends if backend.name in tried]
    way_out = f"take --backend {' or '.join(here)}" if here else "take --target android"
    raise NotYetError(
        f"{entry.name} on backend {untried[0]}: not yet, because no bundle of the family {entry.family.name} was made "
        f"and checked with it; {way_out}"
    )


# Beginnings of the names of what text schemes quantise.
_DECODER = "layers.", "lm_head."


def _odd_layers(entry: ModelEntry, scheme: str, parts: tuple[str, ...] | None = None) -> list[str]:
    """Layers, by name, whose inputs are no multiple of the group that a scheme has a scale for.

    Those whose names begin with one of the `parts`; of the tower without.
    """
    from export.families.family import TOWER
    from export.quantize import SCHEMES

    group = SCHEMES[scheme].group if scheme in SCHEMES else None  # others are backends' own
    if group is None:
        return []
    matrices = [
        (name.removesuffix(".weight"), tensor.shape)
        for name, tensor in entry.tensors.items()
        if name.startswith(parts or TOWER) and tensor.needed and len(tensor.shape) == 2 and "embedding" not in name
    ]
    return [f"{name} ({shape[1]} inputs)" for name, shape in matrices if shape[1] % group]


def _layout(word: str, backends: Mapping[str, Backend], target: Target, entry: ModelEntry) -> Layout | None:
    """The layout of another runtime that `word` names; None for our own."""
    from export.targets import LAYOUTS

    made = {name: layout for name, layout in LAYOUTS.items() if layout.backend in target.backends}
    if known_word("layout", word, (OWN, *made)) == OWN:
        return None
    names = dict.fromkeys(backend.name for backend in backends.values())
    if list(names) != [made[word].backend.name]:
        raise RequestError(
            f"layout={word} is not made by backend {' and '.join(names)}; take --backend {made[word].backend.name}, or "
            "leave --layout out"
        )
    if "text" not in backends:
        raise RequestError(f"layout={word} has nothing to lay out: no text graphs are made here; leave --only out")
    axes = len(entry.geometry.text.rope.sections)
    if axes:
        raise RequestError(
            f"layout={word} does not go with {entry.name}: the runtime that takes it counts positions on one axis, the "
            f"image tokens of this model have positions on {axes}; leave --layout out"
        )
    if not entry.family.drop_in:
        raise RequestError(
            f"layout={word} does not go with {entry.name}: the runtime that takes it works out by itself how many "
            "tokens an image has and where its rows end; leave --layout out"
        )
    return made[word]


def paper_cut(least_cut: int) -> int:
    """The paper's cut, or what a model allows at least."""
    return max(PAPER_CUT, least_cut)


def _cut(text: str | None, entry: ModelEntry, layout: Layout | None) -> int:
    """The number of decoder layers that see every image token, by default the paper's, or the least of the model."""
    if text is None:
        return 0 if layout else paper_cut(entry.geometry.least_cut)
    layers, least = entry.geometry.text.layers, entry.geometry.least_cut
    what = "0 prunes behind the projector"
    if least:
        what = f"the tower adds features to every image token behind the first {least} of them"
    why = f" (the decoder layers of {entry.name} that see every image token; {what})"
    cut = whole_number("cut", text, least, layers - 1, why)
    if layout and cut:
        raise RequestError(
            f"cut={cut} does not go with layout={layout.runtime}, which takes image features: those of cut 0; "
            "leave --cut out"
        )
    return cut


def _text_tokens(text: str, entry: ModelEntry) -> int:
    frame = entry.family.frame(range(entry.prefix_tokens), entry.geometry)
    most = entry.geometry.text.max_positions - len(frame.ids)
    why = f" ({entry.name} knows {entry.geometry.text.max_positions} positions, image and prompt included)"
    return whole_number("text_tokens", text, min(LEAST_TEXT_TOKENS, most), most, why)


def number(what: str, text: str) -> float:
    """The number that `text` spells; RequestError for anything else. Its range is its user's to check."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{what}={text[:20]!r} is not a number")
    return value


def whole_number(what: str, text: str, low: int, high: int, why: str = "") -> int:
    """The whole number in low..high that `text` spells; RequestError for anything else."""
    allowed = f"{low}..{high}{why}"
    if not re.fullmatch("[+-]?[0-9]+", text):
        raise RequestError(f"{what}={text[:20]!r} is not a whole number; it must lie in {allowed}")
    if len(text) > 20 or not low <= int(text) <= high:
        raise RequestError(f"{what}={text[:20]} must lie in {allowed}")
    return int(text)


def _keeps(text: str, tokens: int, model: str) -> tuple[int, ...]:
    """The numbers of image tokens that `text` names, in its order: one, or several with commas between them."""
    words = text.split(",")
    if len(words) == 1:
        return (kept_tokens(text, tokens, model),)
    if "" in words:
        raise RequestError(f"keep={text[:60]!r} has nothing on one side of a comma; write numbers such as 192,128,64")
    keeps = tuple(kept_tokens(word, tokens, model) for word in words)
    twice = next((keep for keep in keeps if keeps.count(keep) > 1), None)
    if twice is not None:
        raise RequestError(f"keep={text[:60]} names {twice} twice; name each keep once")
    if len(keeps) > MOST_KEEPS:
        raise RequestError(f"keep={text[:60]} names {len(keeps)} keeps; one bundle holds at most {MOST_KEEPS}")
    return keeps


def _check_takes_keeps(text: str, backends: Mapping[str, Backend], layout: Layout | None) -> None:
    """Refuses several keeps where their vision graphs could not share text graphs and weights."""
    from export.targets import TARGETS

    if layout:
        raise RequestError(
            f"keep={text} does not go with layout={layout.runtime}, whose runtime knows one number of image tokens; "
            "give one keep, or leave --layout out"
        )
    closed = dict.fromkeys(backend.name for backend in backends.values() if not backend.open_axes)
    if not closed:
        return
    able = dict.fromkeys(
        f"{backend.name} ({target.name})"
        for target in TARGETS.values()
        for backend in target.backends
        if backend.open_axes
    )
    raise RequestError(
        f"keep={text}: backend {' and '.join(closed)} makes graphs for one number of image tokens alone; give one "
        f"keep, or take a backend that makes several in one bundle: {', '.join(able)}"
    )


def kept_tokens(text: str, tokens: int, model: str) -> int:
    """The number of image tokens that `text` names, of the `tokens` that a photo has: `64`, `11%` or `all`."""
    if text == "all":
        return tokens
    if is_share(text):
        return read_share(text).of(tokens)
    if text.isalpha():
        raise RequestError(f"keep={text!r} is neither `all` nor a share such as 11% nor a whole number in 1..{tokens}")
    return whole_number("keep", text, 1, tokens, f" (the image tokens of {model})")


def _method(word: str | None, cut: int, entry: ModelEntry, backend: Backend, *, pruned: bool) -> str:
    """The name of the pruning method that `word` names; RequestError for one that cannot be exported here."""
    if word is None:
        return DEFAULT_METHOD
    from pruning import METHODS

    method = METHODS[known_word("method", word, METHODS)]
    if not pruned:
        raise RequestError(f"method={word} has nothing to choose: all image tokens are kept; leave --method out")
    arithmetic = backend.pruner_arithmetic
    fitting = {name: other for name, other in METHODS.items() if arithmetic in other.arithmetics}
    if "question" in method.needs:
        others = ", ".join(name for name, other in fitting.items() if "question" not in other.needs)
        raise RequestError(
            f"method={word} chooses by the question, but a photo is pruned and prefilled before anybody asks about it; "
            f"take one that chooses by the image alone: {others}"
        )
    if "attention" in method.needs and not entry.family.class_token:
        others = ", ".join(name for name, other in fitting.items() if other.needs <= {"keys"})
        raise RequestError(
            f"method={word} chooses by the attention of the tower's class token, and the tower of {entry.name} has "
            f"none; take one of: {others}"
        )
    if arithmetic not in method.arithmetics:
        raise RequestError(
            f"method={word} has no form for engines that compute in {arithmetic}, as {backend.name} does: its choices "
            f"take more bits; take another --backend, or one of: {', '.join(fitting)}"
        )
    if not method.cuts.allow(cut):
        nearest = cut if method.cuts.least <= cut else method.cuts.least
        nearest = nearest if method.cuts.most is None else min(nearest, method.cuts.most)
        raise RequestError(
            f"method={word} cannot prune at cut={cut}; it can at {method.cuts}: take --cut {nearest}, "
            "or leave --method out"
        )
    return word


def _prune_spec(entry: ModelEntry, keep: int, method: str) -> PruneSpec:
    from pruning import PruneSpec, SpecError

    try:
        geometry = entry.geometry
        return PruneSpec(grid=geometry.grid, overview=geometry.overview, keep=keep, method=method)
    except SpecError as error:
        raise RequestError(str(error)) from error


def _check_size(graph: str, parameters: int, backend: Backend, entry: ModelEntry, precision: Precision) -> None:
    """Refuses a graph whose weights do not fit into one file of its backend."""
    size_bytes = parameters * (2 if precision == "fp16" else 4)
    if backend.most_graph_bytes is not None and size_bytes > backend.most_graph_bytes:
        raise RequestError(
            f"{graph} of {entry.name} has about {_gib(size_bytes)} of weights in {precision}; a file of backend "
            f"{backend.name} holds its weights itself and at most {_gib(backend.most_graph_bytes)}; take another "
            "--backend, or the smaller graph of --cut 0 --only vision"
        )


def _check_weights(weights: str | None) -> None:
    if weights is None or weights == "random":
        return
    if not is_text(weights):
        raise RequestError(f"weights={weights} has a name that is not in UTF-8; rename the checkpoint folder")
    path = Path(weights)
    try:
        exists = bool(weights) and path.exists()
    except OSError as error:
        raise RequestError(f"weights={weights[:80]!r} cannot be read: {error.strerror or error}") from error
    if not exists:
        raise RequestError(f"weights={weights!r} does not exist; give a checkpoint folder, or the word random")
    if not path.is_dir():
        raise RequestError(f"weights={weights} is a file; give the folder that holds config.json and *.safetensors")


def _check_installed(backend: Backend) -> None:
    missing = [package for package in backend.packages if find_spec(package) is None]
    if missing:
        delegates = {"onnxruntime_qnn": "qnn", "onnxruntime_ep_webgpu": "webgpu"}
        extras = ",".join(["export", *(delegates[name] for name in missing if name in delegates)])
        raise ExportError(
            f"backend {backend.name} needs {', '.join(missing)}, not installed here; "
            f"run: pip install 'pruneport[{extras}]'"
        )


def _check_reference(word: str) -> None:
    """Refuses a device for the desktop outputs that is none, or that is not here."""
    from export.golden import REFERENCES, golden_device

    if known_word("reference", word, REFERENCES) == "cuda":
        golden_device(word)


def _photo_path(image: str | None) -> Path:
    if image is not None:
        return Path(image)
    installed = sample_paths(DEFAULT_PHOTOS)
    if installed:
        return installed[0]
    raise ImageError(
        "no photo to check with: neither scikit-learn nor scikit-image, whose sample photos are the default, "
        "is installed; give one with --image PHOTO"
    )


def _calibration(
    folder: str | None, backend: Backend, quant_vision: str | None
) -> Mapping[str, NDArray[np.uint8]] | None:
    if not (backend.calibrates and quant_vision):
        if folder is not None:
            raise RequestError(
                f"calibration={folder} has nothing to calibrate: no activations are quantised ahead here; leave "
                "--calibration out, or take --backend qnn --quant-vision a16w8"
            )
        return None
    return default_photos() if folder is None else read_photos(Path(folder))


def _needs(
    entry: ModelEntry,
    cut: int,
    precision: Precision,
    *,
    text: bool,
    quant_vision: str | None,
    quant_text: str | None,
    text_precision: Precision,
    backend: Backend,
    text_backend: Backend,
    bundles: int,
    goldens: int,
    folder: Path,
) -> Needs:
    from export.memory import available_bytes

    size = 2 if precision == "fp16" else 4
    if backend.reads_late and text_backend.reads_late:
        ram_bytes, bundle_bytes = _needs_of_late_weights(
            entry,
            cut,
            size,
            text=text,
            quant_vision=quant_vision,
            quant_text=quant_text,
            backend=backend,
            text_backend=text_backend,
            bundles=bundles,
        )
    else:
        graph_bytes = entry.vision_parameter_count(cut) * size
        text_ram_bytes, text_bytes = 0.0, 0
        if text:
            size = 2 if text_precision == "fp16" else 4
            weights = entry.text_parameter_count()
            text_bytes = text_backend.text_copies * (weights if quant_text else weights * size)
            text_ram_bytes = weights * (RAM_PER_QUANTISED_WEIGHT if quant_text else RAM_PER_GRAPH_BYTE * size)
        ram_bytes = backend.ram_factor * RAM_PER_GRAPH_BYTE * graph_bytes + text_backend.ram_factor * text_ram_bytes
        bundle_bytes = graph_bytes + text_bytes
    pairs = 4 * max(0, entry.geometry.image_tokens**2 - _MEASURED_TOKENS**2)
    ram_bytes += pairs * (_SCORES * entry.geometry.text.heads + _PRUNER_MATRICES)
    return Needs(
        ram_bytes=BASE_RAM_BYTES + int(ram_bytes),
        ram_available_bytes=available_bytes(),
        disk_bytes=int(bundles * bundle_bytes + goldens * (KEEP_EXTRA_BYTES + pairs)),
        disk_free_bytes=shutil.disk_usage(_nearest_folder(folder)).free,
    )


def _needs_of_late_weights(
    entry: ModelEntry,
    cut: int,
    size: int,
    *,
    text: bool,
    quant_vision: str | None,
    quant_text: str | None,
    backend: Backend,
    text_backend: Backend,
    bundles: int,
) -> tuple[float, float]:
    """RAM beside the libraries and the bytes of one bundle; `size` is what an unquantised weight takes.

    The more of four: the desktop's decoder layers in float32, which are held for its answer where they fit; a float32
    graph that float16's range is measured on; lowering; and the check, in which all graphs are open and one is read
    from the file.
    """
    from export.backends.xnnpack import PIECE_NUMBERS
    from export.memory import fits_beside

    def stored(scheme: str | None) -> float:
        return _stored_bytes(scheme, size)

    def opened(by: Backend) -> Callable[[str | None], float]:
        return _opened_bytes if by.engine == "onnxruntime" else stored

    tower = entry.vision_parameter_count(0)
    below = entry.vision_parameter_count(cut) - tower
    table = math.prod(entry.tensors["embed_tokens.weight"].shape) if text else 0
    layers = entry.text_parameter_count() - table if text else 0
    rows = table * (_BYTES_PER_ROW_NUMBER if quant_text else size)
    all_layers = sum(math.prod(entry.tensors[name].shape) for name in entry.tensors if name.startswith("layers."))
    # Beside the layers the head, and about as much while weights are made float32 (export_whole-qwen*.json).
    answering = 4 * (all_layers + 2 * table) if text and fits_beside(4 * all_layers) else 0
    measuring = 4 * (tower + (0 if quant_text else below)) if size == 2 and not quant_vision else 0
    lowering = RAM_PER_LARGEST_WEIGHT * entry.largest_parameter_count(cut, text=text)

    def below_cut(of: Callable[[str | None], float]) -> float:
        mixed = backend is not text_backend  # they are then made as the rest of the vision graph
        return below * of(quant_vision) if mixed else _below_cut_bytes(entry, cut, quant_text, of)

    # In the file of one backend the layers below the cut lie once, with those of the vision graph.
    above = layers - (below if backend is text_backend else 0)
    bundle = tower * stored(quant_vision) + below_cut(stored)
    bundle += rows + above * stored(quant_text) if text else 0
    held = tower * opened(backend)(quant_vision) + below_cut(opened(backend))
    sizes = entry.geometry.text
    opening = 4.0 * 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * _TOKENS_IN_CHECK if text else 0.0
    if text_backend.engine == "onnxruntime":  # rows and what is not packed yet are pages of the file
        held += layers * opened(text_backend)(quant_text)
    else:  # XNNPACK shares what it packs
        held += rows + above * stored(quant_text) if text else 0
        # The file has float32 weights in 16 bits, where they were published so, and each piece's while it is opened.
        piece = PIECE_NUMBERS + all_layers // sizes.layers
        opening += min(piece, max(tower + below, layers)) * min(max(stored(quant_vision), stored(quant_text)), 2)
    checking = bundles * held + opening
    return max(answering, measuring, lowering, checking), bundle


def _stored_bytes(scheme: str | None, size: int) -> float:
    """What a weight takes in the file, its share of a group's scale included."""
    from export.quantize import SCHEMES

    if scheme is None:
        return size
    known = SCHEMES[scheme]
    return known.bits / 8 + (known.scale_bits / 8 / known.group if known.group else 0)


def _opened_bytes(scheme: str | None) -> float:
    """What a weight takes once ONNX Runtime has packed it: float32, or integers with a scale and a sum of each group.

    Float16 weights are expanded, as processors without float16 arithmetic have to.
    """
    from export.quantize import SCHEMES

    if scheme is None:
        return 4
    known = SCHEMES[scheme]
    assert known.group is not None
    return known.bits / 8 + 8 / known.group


def _below_cut_bytes(entry: ModelEntry, cut: int, quant_text: str | None, of: Callable[[str | None], float]) -> float:
    """What the decoder layers below the cut take, whose attention is finer than the rest; `of` one weight by scheme."""
    from export.quantize import schemes_below_cut

    total = 0.0
    for name in entry.tensors:
        if name.startswith(tuple(f"layers.{index}." for index in range(cut))):
            attention, rest = schemes_below_cut(quant_text) if quant_text else (None, None)
            total += math.prod(entry.tensors[name].shape) * of(attention if ".self_attn." in name else rest)
    return total


def _nearest_folder(folder: Path) -> Path:
    """The folder itself or the closest parent that exists: where a new bundle's bytes will go."""
    at = folder.absolute()
    try:
        while not at.exists():
            if at.is_symlink():
                raise OutputError(f"{at} is a link that leads nowhere; remove it or choose another output folder")
            at = at.parent
    except OSError as error:
        raise OutputError(f"{at} cannot be reached: {error.strerror}; choose another output folder") from error
    if not at.is_dir():
        raise OutputError(f"{at} is a file, so no bundle can be put under it; choose another output folder")
    if not os.access(at, os.W_OK | os.X_OK):
        raise OutputError(f"{at} cannot be written to; choose another output folder")
    return at


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
