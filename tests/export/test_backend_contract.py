"""What every backend keeps to: it writes what its recipe says, tells who takes it, and its engine runs it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.backends.backend import Backend, Recipe
from export.graphs.graph import Graph, Parts
from export.quantize import SCHEMES
from export.targets import LAYOUTS, TARGETS
from runtime.bundle import GraphInfo, TensorInfo
from runtime.check.parity import BOUNDS, bound_for, compare
from runtime.engines import ENGINES
from runtime.errors import EngineMissingError
from tests.conftest import needs_chromium

WIDTH = 256


def every_backend() -> Mapping[str, Backend]:
    """All backends as they make graphs, those for one chip or system for each that they know first and last."""
    found = {}
    for target in TARGETS.values():
        for backend in target.backends:
            known = dict(backend.variants.known()) if backend.variants else {"": backend}
            for name in list(dict.fromkeys([next(iter(known)), list(known)[-1]])):
                found["-".join(filter(None, (target.name, backend.name, name)))] = known[name]
    return found


BACKENDS = every_backend()
every = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every_that_lowers_here = pytest.mark.parametrize(
    "backend",
    [pytest.param(made, marks=needs_chromium if made.name == "webgpu" else ()) for made in BACKENDS.values()],
    ids=BACKENDS,
)


class Block(Graph):
    """x (1, 4, W) -> y (1, 4, W): what graphs are made of, small; two of them share their weights."""

    def __init__(self, first: nn.Linear, second: nn.Linear, *, doubled: bool) -> None:
        super().__init__()
        self.first, self.second, self.doubled = first, second, doubled

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 4, WIDTH), dtype=self.dtype),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 4, WIDTH), dtype=self.dtype),)

    @property
    def dtype(self) -> str:
        return str(self.first.weight.dtype).removeprefix("torch.")

    def forward(self, x: Tensor) -> Tensor:
        made = torch.softmax(self.first(x), dim=-1)
        out: Tensor = self.second(made + made if self.doubled else made)
        return out


def blocks(recipe: Recipe) -> dict[str, Graph]:
    """Two graphs of the same layers, in the precision that a backend takes them in."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    graphs: dict[str, Graph] = {
        name: Block(*layers, doubled=doubled) for name, doubled in (("one", False), ("two", True))
    }
    for graph in graphs.values():
        graph.eval().requires_grad_(False)
        if recipe.traced == "fp16":
            graph.half()
    return graphs


@every
def test_declaration(backend: Backend) -> None:
    assert backend.engine in ENGINES
    assert all(find_spec(package) is not None for package in backend.packages)
    for precision in backend.precisions:
        for scheme in (None, *backend.quant_vision, *(name for name in backend.quant_text if name != "none")):
            recipe = backend.recipe(precision, scheme)
            assert recipe.arithmetic.partition("-")[0] in BOUNDS
            assert (recipe.module_scheme is None) or (recipe.backend_scheme is None)
            assert recipe.module_scheme is None or recipe.module_scheme in SCHEMES
            assert recipe.in_half == (recipe.computes == "fp16")
    assert all(layout.backend in BACKENDS.values() or layout.backend.variants for layout in LAYOUTS.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("software_gpu")
@every_that_lowers_here
def test_what_it_writes_runs_in_its_engine(backend: Backend, tmp_path: Path) -> None:
    recipe = backend.recipe(backend.precisions[0], None)
    graphs = blocks(recipe)
    x = torch.rand(1, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = {name: graph(x.to(getattr(torch, graph.input_infos()[0].dtype))) for name, graph in graphs.items()}
    written = backend.lower(graphs, tmp_path)
    assert written.keys() == graphs.keys()
    plain = {path for path in tmp_path.rglob("*") if path.is_file()}
    for name, graph in graphs.items():
        made = written[name]
        info = GraphInfo(
            name=name,
            file=made.file,
            extra_files=made.extra_files,
            engine=backend.engine,
            arithmetic=(recipe.arithmetic,),
            inputs=made.inputs or graph.input_infos(),
            outputs=made.outputs or graph.output_infos(),
            states=made.states,
            coverage=made.coverage,
        )
        files = {tmp_path / file for file in info.files}
        assert files <= plain, "every file that is named is there"
        assert sum(coverage.nodes for coverage in made.coverage) > 0, "somebody takes something"
        assert not any(coverage.outside_nodes for coverage in made.coverage), "and nothing is left"
        extra = tuple(tmp_path / file for file in made.extra_files)
        try:
            loaded = ENGINES[backend.engine](info, tmp_path / made.file, extra, 1)
        except EngineMissingError as error:
            told = error.placement
        else:
            told = None
        if told is not None:  # nobody can run it here; the file itself tells who would
            assert sum(told.delegates.values()) == sum(one.partitions for one in made.coverage)
            continue
        (got,) = loaded.run([x.numpy().astype(info.inputs[0].numpy_dtype)])
        placement = loaded.placement()
        bound = bound_for(info, accumulator_bits=placement.accumulator_bits)
        assert compare("y", expected[name].float().numpy(), np.asarray(got, np.float32), bound=bound).passed
        loaded.close()
    named = {tmp_path / file for made in written.values() for file in (made.file, *made.extra_files)}
    assert not [path for path in plain if not named & {path, *path.parents}], "nothing lies beside what is named"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(made, id=made.name, marks=[pytest.mark.slow] if made.name == "vulkan" else [])
        for made in BACKENDS.values()
        if made.one_by_one
    ],
)
def test_it_reads_weights_when_it_comes_to_them(backend: Backend, tmp_path: Path) -> None:
    """The graphs of a part are built once, and those of the part before are gone by then."""
    recipe = backend.recipe(backend.precisions[0], None)
    built: list[str] = []
    gone: list[weakref.ref[nn.Module]] = []

    def part(name: str) -> Mapping[str, Graph]:
        gc.collect()
        assert not [graph for graph in gone if graph() is not None], "the part before is still in memory"
        graph = blocks(recipe)["one"]
        built.append(name)
        gone.append(weakref.ref(graph))
        return {name: graph}

    graphs = Parts([((name,), partial(part, name)) for name in ("one", "two", "three")])
    written = backend.lower(graphs, tmp_path)
    assert built == ["one", "two", "three"] == list(written)
