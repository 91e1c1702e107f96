"""The one walk from a Plan to finished, checked bundles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

import msgspec

from export.keys import checkpoint_key, request_key
from export.stages import KEPT, Key, Stages, graph_stage, stages_key
from runtime.bundle import GraphInfo, Manifest, RangesInfo, read_bundle
from runtime.errors import ExportError
from runtime.hand_over import hand_over_fault, text_side
from runtime.memory import give_back
from runtime.ready_made import EMBED_TOKENS
from runtime.text_graphs import TEXT_PREFILL, TOKEN_EMBEDDING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from export.backends.backend import Backend, LoweredGraph, Recipe
    from export.families.family import Checkpoint
    from export.graphs.graph import Graph, Parts
    from export.graphs.vision import VisionEncoder
    from export.models.prompt import SampleText
    from export.progress import Progress, Stage
    from export.ranges import Ranges
    from export.request import BundlePlan, KeepPlan, Plan
    from runtime.bundle import (
        Bundle,
        BundleWriter,
        DelegateCoverage,
        TensorInfo,
        TextInfo,
    )
    from runtime.check.verdict import Verdict

# How many default photos, beside the photo of the check, show how large the numbers inside a float16 graph become.
RANGE_PHOTOS = 4


@dataclass(frozen=True)
class Made:
    """A finished export: the bundle on disk and what its check said."""

    bundle: Bundle
    verdict: Verdict


def stage_count(plan: Plan) -> int:
    """How many stages `export` reports for this plan."""
    return 2 + 5 * len(plan.bundles)


def export(plan: Plan, *, progress: Progress, version: str, resume: bool = False) -> Made:
    """Makes the bundles of a plan and checks them in their engine.

    Nothing appears under a bundle's name before it is whole: any exception, Ctrl-C included, removes what was begun.
    With `resume` what an export of the same plan left that was killed is taken over, and its finished stages are kept.

    `version` is pruneport's own, for the manifest.

    Raises:
        PruneportError: what could not be used or done; runtime/errors.py has the tree.
    """
    from export.checkpoints import open_checkpoint
    from export.request import check_memory
    from export.weights import Followed, LateCheckpoint
    from runtime.bundle import BundleWriter
    from runtime.leftovers import clean

    check_memory(plan)
    requests = [request_key(plan, bundle, version=version) for bundle in plan.bundles]

    def asked(request: str) -> Callable[[bytes], bool] | None:
        return (lambda raw: (key := stages_key(raw)) is not None and key.request == request) if resume else None

    with ExitStack() as stack:
        # Opened before any work, so that an output that cannot be written is found out first.
        writers = [
            stack.enter_context(BundleWriter(bundle.path, resume=asked(request)))
            for bundle, request in zip(plan.bundles, requests, strict=True)
        ]
        own = {writer.path for writer in writers}
        leftovers = [leftover for leftover in clean(plan.bundle.path.parent) if leftover.path not in own]
        with progress.stage("open the checkpoint") as stage:
            checkpoint = open_checkpoint(plan.entry, weights=plan.weights, seed=plan.seed, bars=not progress.quiet)
            identity = checkpoint.identity()
            stage.note(f"{identity.id} ({identity.source}), sha256 {identity.sha256[:16]}")
            if unread := checkpoint.unread():
                stage.note(f"left alone: {len(unread)} tensors that are no part of the model, such as {unread[0]!r}")
            keys = [Key(request, checkpoint_key(checkpoint)) for request in requests]
            kept = [Stages(writer, key) for writer, key in zip(writers, keys, strict=True)]
            for one in kept:
                if one.note:
                    stage.note(one.note)
            if resume and not any(writer.resumed for writer in writers):
                stage.note("nothing to resume: no export of this request was killed after its first stage")
            for leftover in leftovers:
                stage.note(str(leftover))
                if not resume and stages_key(leftover.stages) in keys:
                    stage.note("it was of the same request: --resume would have gone on where it stood")
        late = all(recipe.backend.reads_late for recipe in plan.parts.values())
        followed = Followed(checkpoint)
        making = _Making(plan, LateCheckpoint(followed) if late else followed, progress, version)
        manifests = [
            making.write(bundle, writer, stages)
            for bundle, writer, stages in zip(plan.bundles, writers, kept, strict=True)
        ]
        del checkpoint, followed, making, kept
        gc.collect()
        give_back()
        verdicts = [
            _check(bundle, writer.path, writers[0].path if plan.twin and bundle is not plan.twin else None, progress)
            for bundle, writer in zip(plan.bundles, writers, strict=True)
        ]
        with progress.stage("finish"):
            bundles = [writer.commit(manifest) for writer, manifest in zip(writers, manifests, strict=True)]
    return Made(bundles[-1], verdicts[-1])


class _Desktop(msgspec.Struct, frozen=True):
    """What computed the desktop outputs, and what float16 means for the text graphs: see `_Making._write_golden`."""

    device: str
    text_ranges: RangesInfo | None


class _Lowered(msgspec.Struct, frozen=True):
    """Graphs as they were written, and for the vision graph in float16 what was measured."""

    graphs: tuple[GraphInfo, ...]
    ranges: RangesInfo | None


@dataclass(frozen=True)
class _Half:
    """What float16 means for a vision graph: what was measured, and the float32 modules it needs, by their paths."""

    info: RangesInfo
    islands: dict[str, nn.Module]


@dataclass(frozen=True)
class _Making:
    """What all bundles of one export are made from."""

    plan: Plan
    checkpoint: Checkpoint
    progress: Progress
    version: str

    def write(self, bundle: BundlePlan, writer: BundleWriter, stages: Stages) -> Manifest:
        """Writes golden tensors, graph and manifest of one bundle into its partial folder, but for kept `stages`."""
        from export.manifests import manifest_of
        from runtime.bundle import GoldenInfo
        from runtime.image import preprocess

        plan, checkpoint = self.plan, self.checkpoint
        image = plan.entry.family.image(checkpoint.folder, checkpoint.geometry)
        # Streamed layer by layer, and before the graph's own weights are in memory: lowering alone sets the peak.
        with self.progress.stage(_label("desktop outputs", bundle)) as stage:
            preprocess(plan.photo, image)  # refuses a photo that no phone could take, before transformers tries it
            self._follow(stage, times=len(bundle.keeps))
            made = [self._desktop(keep, bundle, writer.path, stages, stage) for keep in bundle.keeps]
            # Of one that was kept, another GPU may have made it; each is named once.
            device = ", ".join(dict.fromkeys(each.device for each in made))
            text_half = _widest([each.text_ranges for each in made if each.text_ranges is not None])
            stage.note(f"made on {device}")
            if text_half is not None:
                stage.note(f"fp16 range of the text graphs: {text_half}")
        ready = plan.layout
        islands = text_half.islands if text_half else ()
        lower = self._lower_ready_made if ready else self._lower
        lowered = lower(bundle, writer.path, islands, stages)
        with self.progress.stage(_label("write the bundle", bundle)) as stage:
            if stages.kept("manifest", bool):
                stage.note(KEPT)
                return read_bundle(writer.path).manifest
            self._carry(writer.path)
            manifest = writer.write_manifest(
                manifest_of(
                    plan,
                    checkpoint,
                    bundle,
                    lowered.graphs,
                    image=image,
                    text=None if ready else self._text_info(),
                    golden=GoldenInfo(
                        file=bundle.keeps[0].golden,
                        device=device,
                        torch=metadata.version("torch"),
                        photo=plan.photo_name,
                    ),
                    ranges=lowered.ranges,
                    text_ranges=text_half,
                    version=self.version,
                )
            )
            stages.finished("manifest", True)
            return manifest

    def _follow(self, stage: Stage, *, times: int = 1) -> None:
        """Measures how far a stage is by how many of the model's numbers it has read, so many times each."""
        from export.weights import Followed, at_once

        followed = at_once(self.checkpoint)
        assert isinstance(followed, Followed)
        entry, text = self.plan.entry, self.plan.text is not None
        numbers = entry.vision_parameter_count(0 if text else self.plan.cut)
        stage.expect(times * (numbers + (entry.text_parameter_count() if text else 0)))
        followed.seen = stage.advance

    def _desktop(self, keep: KeepPlan, bundle: BundlePlan, folder: Path, stages: Stages, stage: Stage) -> _Desktop:
        """Writes the golden file of one keep, unless an interrupted run did."""
        several = len(bundle.keeps) > 1
        name = f"desktop outputs of keep {keep.keep}" if several else "desktop outputs"
        desktop = stages.kept(name, _Desktop)
        if desktop is None:
            desktop = _Desktop(*self._write_golden(keep, folder))
            stages.finished(name, desktop)
        else:
            stage.note(f"{KEPT}: {keep.golden}" if several else KEPT)
        return desktop

    def _write_golden(self, keep: KeepPlan, folder: Path) -> tuple[str, RangesInfo | None]:
        """Writes what the desktop model computes for the photo at one keep.

        Returns the device that computed it, and where the text graphs compute in float16 what that means for them.
        """
        import torch
        from safetensors.numpy import save

        from export.golden import device_words, golden_device, make_golden
        from export.ranges import Watch
        from pruning import SpecError

        plan = self.plan
        device = golden_device(plan.request.reference)
        watch = Watch() if plan.text is not None and plan.text.in_half and plan.layout is None else None
        try:
            golden = make_golden(
                self.checkpoint,
                self.plan.entry,
                keep.spec,
                cut=self.plan.cut,
                framed=self.plan.framed,
                pixel_values=self._desktop_pixels(),
                text=self._sample_text(),
                device=device,
                watch=watch,
            )
        except SpecError as error:
            raise ExportError(f"the image tokens of {self.plan.photo_path} cannot be pruned: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ExportError(
                f"the desktop outputs do not fit into the memory of {device_words(device)}; free it, or take "
                "--reference cpu"
            ) from error
        if keep.spec is not None and golden["kept_indices"].shape != (keep.keep,):
            raise ExportError(
                f"the desktop model kept {golden['kept_indices'].size} image tokens instead of {keep.keep}: "
                "pruning did not happen as asked; please report this"
            )
        # Serialised in memory first: a full disk is then an OSError like any other.
        (folder / keep.golden).write_bytes(save({**golden, "photo": self.plan.photo}))
        made_on = device_words(device)
        if watch is None or plan.text is None:
            return made_on, None
        return made_on, self._ranges_info(watch.ranges(), (plan.photo_name,), plan.text)

    def _desktop_pixels(self) -> NDArray[np.float32]:
        """The photo as transformers' own image processor prepares it: (1, 3, height, width) float32.

        Not by `runtime.image`, which the phones follow: the check compares the two.
        """
        desktop = self.plan.entry.family.desktop(self.checkpoint, "cpu")
        return desktop.pixels(self.plan.photo)

    def _sample_text(self) -> SampleText | None:
        if self.plan.text_tokens is None:
            return None
        from export.graphs.decoder import PROMPT_CHUNK
        from export.models.prompt import sample_text

        return sample_text(self.checkpoint.folder, self.checkpoint.geometry, self.plan.entry, tokens=PROMPT_CHUNK + 1)

    def _lower(self, bundle: BundlePlan, folder: Path, islands: tuple[str, ...], stages: Stages) -> _Lowered:
        """Builds the graphs and has the backend write them; the modules are gone when this returns.

        `islands` are the modules of the text graphs that compute in float32.
        """
        from runtime.image import preprocess

        plan = self.plan
        infos: dict[str, tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]] = {}

        def noted(built: Mapping[str, Graph]) -> Mapping[str, Graph]:
            """Says what the backend is to do with graphs, and notes what they take and give while they are there."""
            for name, graph in built.items():
                infos[name] = graph.input_infos(), graph.output_infos()
                if scheme := plan.recipe(name).backend_scheme:
                    graph.compression = scheme
                if plan.sees(name) and plan.calibration is not None:
                    image = plan.entry.family.image(self.checkpoint.folder, self.checkpoint.geometry)
                    graph.calibration = [(preprocess(photo, image),) for photo in plan.calibration.values()]
            return built

        def info(name: str, place: str, lowered: LoweredGraph) -> GraphInfo:
            inputs, outputs = infos.get(name, ((), ()))  # of one that was kept the backend says them
            return GraphInfo(
                name=name,
                file=f"{place}{lowered.file}",
                extra_files=tuple(f"{place}{file}" for file in lowered.extra_files),
                engine=plan.recipe(name).backend.engine,
                arithmetic=plan.arithmetic(name),
                inputs=lowered.inputs or inputs,
                outputs=lowered.outputs or outputs,
                states=lowered.states,
                coverage=lowered.coverage,
            )

        places = [f"{part}/" for part in plan.parts] if plan.mixed else [""]
        made = {place: each for place in places if (each := stages.kept(f"graphs {place}", _Lowered)) is not None}
        with self.progress.stage(_label("build the graphs", bundle)) as stage:
            if len(made) == len(places):
                stage.note(KEPT)
                graphs = None
            else:
                graphs = self._build(bundle, stage, islands, noted)
        with self.progress.stage(_label("trace and lower", bundle)) as stage:
            self._follow(stage)
            if made:
                stage.note(KEPT)
            for backend, group, place in self._by_backend(bundle, graphs) if graphs is not None else ():
                if place in made:
                    continue
                (folder / place).mkdir(exist_ok=True)
                to_lower = group if backend.one_by_one else dict(group)
                finished = [name for name in group if stages.has_kept(graph_stage(name))]
                if finished:
                    stage.note(f"{KEPT}: {', '.join(finished)}")
                if backend.lower_on is not None:
                    written = backend.lower_on(to_lower, folder / place, stages)
                else:
                    written = backend.lower(to_lower, folder / place)
                made[place] = _Lowered(
                    tuple(info(name, place, written[name]) for name in group),
                    self._half.info if bundle.graphs[0] in list(group) and self._half else None,
                )
                for graph in made[place].graphs:
                    self._check_taken(graph.name, graph.coverage, stage)
                stages.finished(f"graphs {place}", made[place])
                gc.collect()
                give_back()
        graph_infos = tuple(graph for place in places for graph in made[place].graphs)
        if plan.text is not None:
            by_name = {graph.name: graph for graph in graph_infos}
            for vision in bundle.graphs:
                fault = hand_over_fault(by_name[vision], *text_side(by_name))
                if fault:
                    raise ExportError(f"{fault}; please report this")
        return _Lowered(graph_infos, next((each.ranges for each in made.values() if each.ranges), None))

    def _by_backend(self, bundle: BundlePlan, graphs: Parts) -> Iterator[tuple[Backend, Parts, str]]:
        """What each backend is to lower, and where: two of them may call their files alike, and get a folder each."""
        if not self.plan.mixed:
            yield self.plan.vision.backend, graphs, ""
            return
        for (part, recipe), group in zip(self.plan.parts.items(), graphs.split(len(bundle.keeps)), strict=True):
            yield recipe.backend, group, f"{part}/"

    def _lower_ready_made(self, bundle: BundlePlan, folder: Path, islands: tuple[str, ...], stages: Stages) -> _Lowered:
        plan = self.plan
        assert not islands
        assert plan.layout is not None
        assert plan.text is not None
        assert plan.text_tokens is not None
        kept = stages.kept("graphs ", _Lowered)
        with self.progress.stage(_label("build the graphs", bundle)) as stage:
            if kept is None:
                encoder = self._vision(bundle.keeps[0], stage)
            else:
                stage.note(KEPT)
        with self.progress.stage(_label("trace and lower", bundle)) as stage:
            if kept is not None:
                stage.note(KEPT)
                return kept
            graphs = plan.layout.load()(
                self.checkpoint,
                plan.entry,
                encoder,
                folder,
                quant_text=plan.text.scheme,
                text_tokens=plan.text_tokens,
                arithmetic=plan.arithmetic,
            )
            for graph in graphs:
                self._check_taken(graph.name, graph.coverage, stage)
            made = _Lowered(graphs, self._half.info if self._half else None)
            stages.finished("graphs ", made)
        return made

    def _build(
        self,
        bundle: BundlePlan,
        stage: Stage,
        islands: tuple[str, ...],
        noted: Callable[[Mapping[str, Graph]], Mapping[str, Graph]],
    ) -> Parts:
        """The vision graph and, where they are wanted, the text graphs, whose weights are read when they are come to.

        `noted` is shown the graphs of a part once they are there.
        """
        from export.graphs.decoder import PROMPT_CHUNK, TEXT_GRAPHS, Context, build_text_graphs, precise_modules
        from export.graphs.graph import Parts
        from export.graphs.open_decoder import open_text_parts
        from export.graphs.stateful import build_stateful_text_graphs
        from export.ranges import make_islands

        plan = self.plan
        # The first says what the text graphs need to know; the others are built when they are come to.
        encoder = self._vision(bundle.keeps[0], stage)
        waiting = [encoder]

        def vision_graph(keep: KeepPlan) -> Mapping[str, Graph]:
            return noted({keep.graph: waiting.pop() if waiting else self._vision(keep, stage)})

        vision = [((keep.graph,), partial(vision_graph, keep)) for keep in bundle.keeps]
        if plan.text_tokens is None or plan.text is None:
            return Parts(vision)
        geometry = self.checkpoint.geometry
        context = Context(
            geometry,
            encoder.frame,
            keep=max(encoder.frame.left(keep.keep) for keep in bundle.keeps),
            cut=plan.cut,
            text=plan.text_tokens,
            index=encoder.index_name,
        )
        most = plan.vision.backend.most_positions
        if most is not None and context.first_text > most:
            raise ExportError(
                f"prompt and image take {context.first_text} positions; backend {plan.vision.backend.name} counts them "
                f"in float16, which is exact up to {most}; take another --backend for the vision graph"
            )
        most = plan.text.backend.most_positions
        if most is not None and context.positions > most:
            raise ExportError(
                f"prompt, image and text_tokens={plan.text_tokens} take {context.positions} positions; "
                f"backend {plan.text.backend.name} counts them in float16, which is exact up to {most}; "
                "give fewer --text-tokens"
            )
        if context.positions > geometry.text.max_positions:
            raise ExportError(
                f"prompt and image take {context.first_text} positions and text_tokens={plan.text_tokens} the rest of "
                f"{context.positions}, but {plan.entry.name} knows {geometry.text.max_positions}; "
                "give fewer --text-tokens"
            )
        quant = plan.text.module_scheme
        if plan.text.backend.open_axes:
            parts = open_text_parts(
                self.checkpoint,
                context,
                precision=plan.text.traced,
                embedding_precision=plan.recipe(TOKEN_EMBEDDING).traced,
                embedding_in_bytes=plan.recipe(TOKEN_EMBEDDING).module_scheme is not None,
                quant=quant,
                chunk=PROMPT_CHUNK,
                precise=islands,
            )
            return Parts([*vision, *((names, lambda build=build: noted(build())) for names, build in parts)])

        def text() -> Mapping[str, Graph]:
            precision = plan.recipe(TOKEN_EMBEDDING).traced
            built = (
                build_stateful_text_graphs(self.checkpoint, context, quant=quant)
                if plan.states
                else build_text_graphs(self.checkpoint, context, precision=precision, quant=quant)
            )
            if islands:  # the text graphs share their layers
                make_islands(built[TEXT_PREFILL], precise_modules(self.checkpoint, islands))
            return noted(built)

        return Parts([*vision, (TEXT_GRAPHS, text)])

    def _vision(self, keep: KeepPlan, stage: Stage) -> VisionEncoder:
        from export.graphs.vision import build_vision_encoder
        from export.quantize import quantize

        plan = self.plan
        if self._half is not None:
            gc.collect()  # the float32 graph
            stage.note(f"fp16 range: {self._half.info}")
        encoder = build_vision_encoder(
            self.checkpoint,
            plan.entry,
            keep.spec,
            cut=plan.cut,
            framed=plan.framed,
            precision=plan.vision.traced,
            quant_layers=plan.shared_scheme,
            arithmetic=plan.vision.backend.pruner_arithmetic,
            cache=plan.cache,
            index=plan.index,
        )
        handed_on = encoder.output_infos()[0].shape[1] - encoder.prefix_length
        wanted = encoder.frame.left(keep.keep)
        if handed_on != wanted:
            raise ExportError(f"{keep.graph} hands on {handed_on} image tokens instead of {wanted}; please report this")
        if self._half is not None and self._half.islands:
            from export.ranges import make_islands

            make_islands(encoder, self._half.islands)
        if plan.vision.module_scheme:
            quantize(encoder, plan.vision.module_scheme)
        return encoder

    @cached_property
    def _half(self) -> _Half | None:
        """What float16 means for the vision graph of every bundle here; None where it does not compute in that.

        Measured on the float32 graph, of which only the islands are left when this returns. It takes as much memory
        as two float16 ones, while nothing else is there. ExportError where float16 cannot hold the numbers and the
        backend has no way to compute a part in float32.
        """
        if not self.plan.vision.in_half:
            return None
        import torch

        from export.calibration import default_photos
        from export.graphs.vision import build_vision_encoder
        from export.ranges import measure
        from export.weights import at_once
        from runtime.image import preprocess

        plan, checkpoint = self.plan, at_once(self.checkpoint)
        # The pruner is none of it, and quantised decoder layers compute in float32.
        cut = 0 if plan.shared_scheme else plan.cut
        precise = build_vision_encoder(checkpoint, plan.entry, None, cut=cut, framed=cut > 0)
        # Spread over the whole set: photos first, then scenes from night to glare.
        photos = default_photos(RANGE_PHOTOS) | {plan.photo_name: plan.photo}
        image = plan.entry.family.image(checkpoint.folder, checkpoint.geometry)
        pixels = (torch.from_numpy(preprocess(photo, image)) for photo in photos.values())
        info = self._ranges_info(measure(precise, pixels), tuple(photos), plan.vision)
        return _Half(info, {name: precise.get_submodule(name) for name in info.islands})

    def _ranges_info(self, ranges: Ranges, photos: tuple[str, ...], recipe: Recipe) -> RangesInfo:
        """What was measured on `photos`, for the manifest; ExportError where the backend cannot compute an island.

        `recipe` is how the part is made that was measured.
        """
        from export.ranges import SAFETY
        from runtime.bundle import FLOAT16_LARGEST, RangesInfo

        plan = self.plan
        if ranges.beyond and recipe.traced != recipe.computes:
            others = [other.name for other in plan.target.backends if other.traced_precision is None]
            raise ExportError(
                f"{ranges.worst} of the {ranges.graph} reaches {ranges.largest[ranges.worst]:.3g}; backend "
                f"{recipe.backend.name} computes everything in float16, which holds {FLOAT16_LARGEST:.0f} (with a "
                f"safety factor of {SAFETY:g}); take a backend that can compute such modules in float32: "
                + ", ".join(others)
            )
        return RangesInfo(
            worst_module=ranges.worst,
            worst_value=ranges.largest[ranges.worst],
            safety=SAFETY,
            photos=photos,
            islands=ranges.islands,
        )

    def _check_taken(self, name: str, coverages: tuple[DelegateCoverage, ...], stage: Stage) -> None:
        """Notes who took how much of a graph; ExportError when nobody took anything."""
        for coverage in coverages:
            parts = f"{coverage.partitions} partition{'s' if coverage.partitions != 1 else ''}"
            outside = f"{coverage.outside_nodes or 'nothing'} outside"
            stage.note(f"{name}: {coverage.delegate} {coverage.nodes} nodes in {parts}, {outside}")
        # Looking a row up in a table is nothing that a delegate would be faster at.
        if name not in (TOKEN_EMBEDDING, EMBED_TOKENS) and not any(coverage.nodes for coverage in coverages):
            raise ExportError(
                f"backend {self.plan.recipe(name).backend.name} took no node of {name}: the phone would run it without "
                "any acceleration; run again with -v to see why, or choose another --backend"
            )

    def _carry(self, folder: Path) -> None:
        """Writes the checkpoint's files that a phone needs, except those that a layout wrote in its own way."""
        from export.models.prompt import has_tokenizer, read_tokenizer_files
        from runtime.prompt import TOKENIZER_FILE

        source = self.checkpoint.folder
        if source is None:
            return
        preprocessor = "preprocessor_config.json"
        if (source / preprocessor).is_file() and not (folder / preprocessor).exists():
            copyfile(source / preprocessor, folder / preprocessor)
        # The file as it lies there may pad, cut, drop merges at random, and lack tokens that other files add.
        if has_tokenizer(source) and not (folder / TOKENIZER_FILE).exists():
            (folder / TOKENIZER_FILE).write_text(read_tokenizer_files(source).content, encoding="utf-8")

    def _text_info(self) -> TextInfo | None:
        if self.plan.text_tokens is None:
            return None
        from export.graphs.decoder import PROMPT_CHUNK
        from export.models.prompt import end_ids
        from runtime.bundle import TextInfo

        return TextInfo(
            tokens=self.plan.text_tokens,
            chunk=PROMPT_CHUNK,
            end_ids=end_ids(self.checkpoint),
        )


def _check(bundle: BundlePlan, path: Path, twin: Path | None, progress: Progress) -> Verdict:
    """Reads a bundle back from disk, runs it in its engine and writes the reports; an unequal result is a verdict."""
    from runtime.harness import check_bundle

    with progress.stage(_label("check in the engine", bundle)) as stage:
        verdict = check_bundle(path, twin=twin)
        for step in verdict.steps:
            if step.status != "passed":
                stage.note(f"{step.name} {step.status}: {step.detail}" + (f"; {step.remedy}" if step.remedy else ""))
    return verdict


def _label(what: str, bundle: BundlePlan) -> str:
    return f"{what}, {bundle.words}"


def _widest(found: Sequence[RangesInfo]) -> RangesInfo | None:
    """What holds for all of the ranges that were found, those of several keeps."""
    if not found:
        return None
    widest = max(found, key=lambda info: info.worst_value)
    return msgspec.structs.replace(widest, islands=tuple(sorted({name for info in found for name in info.islands})))
