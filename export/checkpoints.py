"""Checkpoints: weights by canonical name, read lazily from safetensors or drawn from a seed, checked up front."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from export.models import MODELS
from export.models.llava import LlavaGeometry, ModelEntry, check_same_model
from export.models.preprocessor import read_object
from runtime.errors import CheckpointError, RequestError
from runtime.names import stored_name

if TYPE_CHECKING:
    import torch

    from runtime.bundle import WeightsInfo

RANDOM = "random"
"""The value of `--weights` that asks for seeded weights of the true geometry."""

_FLOAT_BYTES: Mapping[str, int] = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# The library reading these files refuses longer headers too; a file that claims one is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(Protocol):
    """A LLaVA model's weights under canonical names, whatever layout they are stored in.

    Canonical names start with `vision_tower.`, `multi_modal_projector.`, `language_model.` or `lm_head.`; see
    `canonical_name`.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json."""

    @property
    def geometry(self) -> LlavaGeometry:
        """The sizes that config describes."""

    @property
    def folder(self) -> Path | None:
        """Where tokenizer and preprocessor settings lie; None for random weights."""

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, in order of definition."""

    def has(self, name: str) -> bool:
        """Whether a tensor of that canonical name exists."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the dtype it is stored in; CheckpointError when it holds NaN or infinity."""

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """A few rows of a matrix, without reading the rest: `(len(indices), columns)`."""

    def identity(self) -> WeightsInfo:
        """Where the weights came from, with a hash over all of them."""


def open_checkpoint(model: str | ModelEntry, *, weights: str | None = None, seed: int = 0) -> Checkpoint:
    """The checkpoint of `model`, with everything checked that can be known without reading the weights themselves.

    `weights` is a folder in Hugging Face's layout, or "random"; None looks in the local hub cache and then on the hub
    (`pocket` is made instead). `seed` matters for random weights only.

    Raises RequestError for an unknown model, CheckpointError when there are no usable weights.
    """
    entry = MODELS.get(model) if isinstance(model, str) else model
    if entry is None:
        raise RequestError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    if weights == RANDOM:
        return RandomCheckpoint(entry, seed=seed)
    if weights is not None:
        return FolderCheckpoint(Path(weights), entry)
    if entry.hub_id is None:
        from export.models.pocket import POCKET, pocket_folder

        if entry is not POCKET:
            raise CheckpointError(f"{entry.name} has no place on the hub; give its folder with --weights DIR")
        return FolderCheckpoint(pocket_folder(), entry, label=f"{entry.name} (seeded, untrained)")
    return FolderCheckpoint(_hub_folder(entry, entry.hub_id), entry, label=entry.hub_id)


def _hub_folder(entry: ModelEntry, hub_id: str) -> Path:
    """The snapshot of `hub_id` in the local hub cache, downloaded when it is not there whole."""
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    ways_out = (
        "three ways out: put the files in a folder and pass --weights DIR; connect to the network so that they can be "
        "downloaded; or pass --weights random to measure latency without them"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise CheckpointError(
            f"no weights for {entry.name}: huggingface_hub is not installed ({error}); {ways_out}"
        ) from error
    try:
        cached = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
        if _is_complete(cached):
            return cached
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):
        pass  # nothing in the cache yet: the download below is the next step, not a failure
    try:
        fetched = Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no weights for {entry.name}: {hub_id} is not in the local hub cache and cannot be downloaded "
            f"({reason}); {ways_out}"
        ) from error
    # Without a connection the hub's client hands out an unfinished download as if it were whole.
    if not _is_complete(fetched):
        raise CheckpointError(
            f"no weights for {entry.name}: the copy of {hub_id} in the local hub cache ({fetched}) is incomplete and "
            f"cannot be completed; {ways_out}"
        )
    return fetched


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has every file it names; an interrupted download leaves one that has not."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / _SINGLE).is_file():
        return True
    index = read_object(folder / _INDEX)
    shards = index.get("weight_map") if index else None
    return isinstance(shards, dict) and all((folder / str(name)).is_file() for name in set(shards.values()))


def canonical_name(stored: str) -> str | None:
    """One name for a tensor of either published layout; None for tensors that are constants, not weights.

    The newer layout writes `model.language_model.*`, `model.vision_tower.*`, `model.multi_modal_projector.*` and
    `lm_head.*`; the older one `language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*` and
    `multi_modal_projector.*`. Either may have `vision_model.` inside the tower's names.
    """
    name = stored.removeprefix("model.")
    for old, new in (
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
    ):
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
        return None
    return name


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, name in that file, shape and safetensors dtype."""

    path: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by stored name, after checking that the file is what it says.

    Raises CheckpointError for a file that is missing, of another format, truncated or inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_other_formats(path, start)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or (length <= _MAX_HEADER_BYTES and 8 + length > size):
                raise CheckpointError(
                    f"{path} is truncated: its header alone needs more than the {size} bytes it has; download it again"
                )
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file, whatever its name says (it starts with {start!r}); "
                    "download it again"
                )
            header = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _parse_header(path, header, size - 8 - length)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    what = None
    if start[:4] == b"PK\x03\x04":
        what = "a zip archive, as torch.save writes it (a pickle)"
    elif start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        what = "a Python pickle"
    elif start.startswith(b"version "):
        what = "a git-lfs pointer instead of the file (run `git lfs pull`)"
    elif start.lstrip()[:1] == b"<":
        what = "a web page"
    elif start[:4] == b"GGUF":
        what = "a GGUF file"
    if what:
        raise CheckpointError(
            f"{path} is {what}, not safetensors, whatever its name says; "
            "pickles are refused because loading one can run any program: give safetensors files"
        )


def _parse_header(path: Path, header: bytes, data_bytes: int) -> dict[str, StoredTensor]:
    corrupt = f"{path} is corrupt: "
    again = "; download it again"
    try:
        entries = json.loads(header)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{corrupt}its header is not valid JSON ({error}){again}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{corrupt}its header is not a JSON object{again}")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{corrupt}the header entry of {name!r} is malformed ({error!r}){again}") from error
        if not whole or not isinstance(dtype, str) or end < begin:
            raise CheckpointError(f"{corrupt}the header entry of {name!r} is malformed ({entry!r}){again}")
        if dtype in _FLOAT_BYTES and end - begin != math.prod(shape) * _FLOAT_BYTES[dtype]:
            raise CheckpointError(
                f"{corrupt}{name!r} of shape {list(shape)} and dtype {dtype} cannot have {end - begin} bytes{again}"
            )
        tensors[name] = StoredTensor(path, name, shape, dtype)
        spans.append((begin, end, name))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give the model's safetensors files")
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise CheckpointError(f"{corrupt}the bytes of {name!r} overlap others or leave a gap{again}")
        position = end
    if position > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header promises {position} bytes of weights, the file has {data_bytes}{again}"
        )
    if position < data_bytes:
        raise CheckpointError(
            f"{corrupt}its header describes {position} bytes of weights, the file has {data_bytes}{again}"
        )
    return tensors


class FolderCheckpoint:
    """A folder in Hugging Face's layout: config.json, and one safetensors file or several with an index."""

    def __init__(self, folder: Path, entry: ModelEntry, *, label: str | None = None) -> None:
        """Checks config, files, names, shapes and dtypes; reads no weights. CheckpointError for the first fault."""
        self._folder = folder
        self._label = label or stored_name(Path(os.path.realpath(folder)))
        if not folder.exists():
            raise CheckpointError(f"the weights folder {folder} does not exist; give a folder with config.json in it")
        if not folder.is_dir():
            raise CheckpointError(
                f"--weights {folder} is a file; give the folder that holds config.json and the safetensors files"
            )
        config = read_object(folder / "config.json")
        if config is None:
            raise CheckpointError(f"{folder} has no config.json; give a folder in Hugging Face's layout")
        self._config: Mapping[str, Any] = config
        try:
            self._geometry = LlavaGeometry.from_config(config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        check_same_model(entry, self._geometry, MODELS, str(folder / "config.json"))
        self._files, stored = _stored_tensors(folder)
        self._tensors = _by_canonical_name(folder, stored)
        self._check_tensors(entry)

    def _check_tensors(self, entry: ModelEntry) -> None:
        expected = self._geometry.tensor_shapes()
        optional = self._geometry.optional_tensors()
        missing = [name for name in expected if name not in self._tensors and name not in optional]
        if missing:
            hint = "download the checkpoint again"
            if any("mm_projector" in name for name in self._tensors):
                hint = "this is the authors' own layout: give the converted one, as under llava-hf on the hub"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self._folder} lacks the tensor {missing[0]}{more} that {entry.name} needs; {hint}")
        wrong = [name for name, shape in expected.items() if name in self._tensors and self.shape(name) != shape]
        if wrong:
            name = wrong[0]
            more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
            others = [
                other.name
                for other in MODELS.values()
                if all(self.has(n) and self.shape(n) == s for n, s in other.geometry.tensor_shapes().items())
            ]
            hint = f"these are the weights of {others[0]}" if others else "they belong to another model"
            raise CheckpointError(
                f"{self._tensors[name].path}: {name} has shape {list(self.shape(name))}, but config.json and "
                f"{entry.name} want {list(expected[name])}{more}; {hint}"
            )
        for name in expected:
            stored = self._tensors.get(name)
            if stored is not None and stored.dtype not in _FLOAT_BYTES:
                raise CheckpointError(
                    f"{stored.path}: {name} has dtype {stored.dtype}; supported: {', '.join(_FLOAT_BYTES)}; "
                    "give weights that are not quantised"
                )

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json."""
        return self._config

    @property
    def geometry(self) -> LlavaGeometry:
        """The sizes that config describes."""
        return self._geometry

    @property
    def folder(self) -> Path | None:
        """Where the checkpoint lies."""
        return self._folder

    def names(self) -> tuple[str, ...]:
        """Canonical names of the model's tensors that are there."""
        return tuple(name for name in self._geometry.tensor_shapes() if self.has(name))

    def has(self, name: str) -> bool:
        """Whether the tensor is there, under whatever spelling; a tied output matrix is there as the embedding."""
        return self._alias(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._find(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the dtype it is stored in."""
        found = self._find(name)
        with _opened(found.path) as file:
            return _finite(file.get_tensor(found.stored_name), found)

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Reads a few rows of a matrix."""
        import torch

        found = self._find(name)
        with _opened(found.path) as file:
            matrix = file.get_slice(found.stored_name)
            return _finite(torch.cat([matrix[index : index + 1] for index in indices]), found)

    def identity(self) -> WeightsInfo:
        """The label and the hash of the weights: the file's own, for shards that of their `sha256sum` listing."""
        from runtime.bundle import WeightsInfo

        return WeightsInfo(source="checkpoint", id=self._label, sha256=self._sha256)

    @cached_property
    def _sha256(self) -> str:
        digests = [(path.name, _file_sha256(path)) for path in self._files]
        if len(digests) == 1:
            return digests[0][1]
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests))
        return hashlib.sha256(listing.encode()).hexdigest()

    def _alias(self, name: str) -> str:
        if name == "lm_head.weight" and self._geometry.tied_embeddings and name not in self._tensors:
            return "language_model.embed_tokens.weight"
        return name

    def _find(self, name: str) -> StoredTensor:
        found = self._tensors.get(self._alias(name))
        if found is None:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        return found


def _stored_tensors(folder: Path) -> tuple[tuple[Path, ...], list[StoredTensor]]:
    """All weight files of a folder and what they hold."""
    single, index_path = folder / _SINGLE, folder / _INDEX
    if single.is_file() or single.is_symlink():
        return (single,), list(read_header(single).values())
    index = read_object(index_path)
    if index is None:
        loose = sorted(path.name for path in folder.glob("*.safetensors"))
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
        if pickles and not loose:
            raise CheckpointError(
                f"{folder} holds only pickle weights ({pickles[0]}), which are refused because loading one can run any "
                "program; give safetensors files"
            )
        found = f"it has {', '.join(loose)} without {_INDEX}" if loose else "it has no safetensors file at all"
        raise CheckpointError(f"{folder} has no {_SINGLE}: {found}; download the checkpoint again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map that names files; download it again")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: list[StoredTensor] = []
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard or shard in (".", ".."):
            raise CheckpointError(
                f"{index_path} names the file {shard!r}; only plain file names in that folder are read"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} names {shard!r}, which is not a safetensors file; pickles are refused")
        if shard not in headers:
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise CheckpointError(
                f"{index_path} says that {shard} holds {name}, but it does not; the index belongs to other files: "
                "download the checkpoint again"
            )
        tensors.append(headers[shard][name])
    return tuple(folder / shard for shard in sorted(headers)), tensors


def _by_canonical_name(folder: Path, stored: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = canonical_name(tensor.stored_name)
        if name is None:
            continue
        if name in tensors:
            raise CheckpointError(
                f"{folder} holds {name} twice, as {tensors[name].stored_name} and {tensor.stored_name}; "
                "files of two checkpoints are mixed: download it again"
            )
        tensors[name] = tensor
    return tensors


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; download it again") from error


def _finite(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    import torch

    # A sum is finite only if all terms are; float64 keeps large but sound values from overflowing it.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise CheckpointError(
            f"{stored.path} is corrupt: {stored.stored_name} holds NaN or infinite values; download it again"
        )
    return tensor


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class RandomCheckpoint:
    """Weights of the true geometry drawn from a seed, tensor by tensor: for latency and memory, not for answers.

    Each block of a tensor depends on (seed, name, block number) alone, so any part can be made without the rest.
    The spreads keep activations near 1 through the residual stream, which real checkpoints do too.
    """

    _BLOCK = 1 << 20
    # Changes whenever the same seed would give other numbers.
    _RECIPE = 1

    def __init__(self, entry: ModelEntry, *, seed: int) -> None:
        """`seed` is any whole number from 0 to 2**63 - 1; RequestError otherwise."""
        if not 0 <= seed < 2**63:
            raise RequestError(f"--seed {seed} must lie in 0..{2**63 - 1}")
        self._entry = entry
        self._seed = seed
        self._geometry = entry.geometry
        self._shapes = self._geometry.tensor_shapes()

    @property
    def config(self) -> Mapping[str, Any]:
        """The config the model was published with."""
        return self._entry.config

    @property
    def geometry(self) -> LlavaGeometry:
        """The sizes that config describes."""
        return self._geometry

    @property
    def folder(self) -> Path | None:
        """None: there are no files."""
        return None

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors."""
        return tuple(self._shapes)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of that name."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"{self._entry.name} has no tensor {name}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """Draws one tensor, float16: what the published weights are stored in."""
        import torch

        shape = self.shape(name)
        if len(shape) == 1 and "norm" in name:
            return torch.full(shape, 1.0 if name.endswith(".weight") else 0.0, dtype=torch.float16)
        flat = torch.empty(math.prod(shape), dtype=torch.float16)
        for number, begin in enumerate(range(0, flat.numel(), self._BLOCK)):
            part = flat[begin : begin + self._BLOCK]
            part.copy_(self._block(name, number))
        return flat.view(shape)

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Draws the blocks that a few rows lie in."""
        import torch

        shape = self.shape(name)
        width = math.prod(shape[1:])
        out = torch.empty(len(indices), width, dtype=torch.float16)
        for row, index in zip(out, indices, strict=True):
            if not 0 <= index < shape[0]:
                raise CheckpointError(f"{name} has rows 0..{shape[0] - 1}, not {index}")
            done = 0
            while done < width:
                number, offset = divmod(index * width + done, self._BLOCK)
                take = min(width - done, self._BLOCK - offset)
                row[done : done + take].copy_(self._block(name, number)[offset : offset + take])
                done += take
        return out

    def identity(self) -> WeightsInfo:
        """Marked as random; the hash stands for the recipe, the seed and the shapes, which decide every number."""
        from runtime.bundle import WeightsInfo

        recipe = json.dumps([self._RECIPE, self._seed, list(self._shapes.items())])
        return WeightsInfo(
            source="random",
            id=f"{self._entry.name} with random weights",
            sha256=hashlib.sha256(recipe.encode()).hexdigest(),
            seed=self._seed,
        )

    def _block(self, name: str, number: int) -> torch.Tensor:
        import torch

        digest = hashlib.sha256(f"{self._RECIPE}/{self._seed}/{name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        size = min(self._BLOCK, math.prod(self._shapes[name]) - number * self._BLOCK)
        return torch.empty(size).normal_(0.0, self._spread(name), generator=generator)

    def _spread(self, name: str) -> float:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            return 0.02
        if "embed" in name and "patch" not in name:
            return 0.5
        inputs = math.prod(shape[1:])
        # Branches that end in the residual stream are kept small, or its spread would grow with every layer.
        damped = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
        return (0.25 if damped else 1.0) / math.sqrt(inputs)
