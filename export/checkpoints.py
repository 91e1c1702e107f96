"""Checkpoints: weights by canonical name, read lazily from safetensors or drawn from a seed, checked up front."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from export.families import FAMILIES, MODELS, NOT_YET, family_of, known_model
from export.families.family import Checkpoint, Family, Geometry, ModelEntry, TensorEntry
from export.settings import read_object, shown, without_nulls
from runtime.errors import CheckpointError, RequestError
from runtime.names import stored_name

if TYPE_CHECKING:
    import torch

    from runtime.bundle import WeightsInfo

RANDOM = "random"
"""The value of `--weights` that asks for seeded weights of the true geometry."""

_FLOATS = ("F16", "BF16", "F32", "F64")
# Every type of the format, in bits an element.
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# No shape and no offset can be larger: the library counts in 64 bits.
_MOST_BYTES = 2**63
# The library reading these files refuses longer headers too; a file that claims one is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_FILE_NAME = 255
# What training with adapters leaves in a folder; transformers would load them over the weights beside them.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
_MERGE = (
    "load it over its base model with peft, call merge_and_unload() and save_pretrained(), and give the new folder; "
    "if it is merged already, move its files away"
)
# Tensors by the marks that peft, GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints leave in their names.
_ADAPTER_TENSOR = re.compile(
    r"(^|\.)(base_model|base_layer|modules_to_save|original_module"
    r"|(lora|ia3|oft|boft|hada|lokr|vera|randlora|bone|miss)_\w+)(\.|$)"
)
_QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|qscales|g_idx|scales|zeros|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.\w+|weight_packed|weight_shape|weight_g_idx|weight_zero_point|weight_scale\w*|weight_global_scale"
    r"|input_scale|output_scale|activation_scale|q_scale|k_scale|v_scale)$"
)
# Constants that older versions of transformers stored; what they hold follows from config.json.
_CONSTANTS = (
    ".position_ids",
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
)


def open_checkpoint(
    model: str | ModelEntry, *, weights: str | None = None, seed: int = 0, bars: bool = False
) -> Checkpoint:
    """The checkpoint of `model`, with everything checked that can be known without reading the weights themselves.

    `weights` is a folder in Hugging Face's layout, or "random"; None looks in the local hub cache and then on the hub
    (`pocket` comes with the package). `seed` matters for random weights only. `bars` shows a download on a terminal.

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
        return FolderCheckpoint(pocket_folder(), entry, label=entry.name)
    return FolderCheckpoint(_hub_folder(entry, entry.hub_id, bars=bars), entry, label=entry.hub_id)


def entry_of_folder(folder: Path) -> ModelEntry:
    """The model that a folder's config.json describes: one of its family's where the sizes are the same, else its own.

    Raises CheckpointError for a folder without config.json, and for one of no family that is known.
    """
    config = read_object(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; give a folder in Hugging Face's layout")
    named = config.get("model_type")
    family = family_of(named)
    if family is None:
        types = ", ".join(family.model_type for family in FAMILIES.values())
        reason = NOT_YET.get(named) if isinstance(named, str) else None
        why = f" ({reason})" if reason else ""
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type={shown(named)} is no family that can be exported{why}; supported: "
            f"{types}; give a checkpoint of one of these"
        )
    config = dict(family.whole_config(folder, without_nulls(config)))
    try:
        geometry: Geometry = family.geometry(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    known = known_model(family, geometry)
    if known is not None:
        return known
    text = geometry.text
    return ModelEntry(
        name=re.sub(r"[^a-z0-9.]+", "-", Path(os.path.realpath(folder)).name.lower()).strip("-.") or family.name,
        family=family,
        summary=f"{family.name} of {stored_name(folder)}: {text.layers} layers of width {text.hidden}",
        hub_id=None,
        config=config,
    )


def _hub_folder(entry: ModelEntry, hub_id: str, *, bars: bool) -> Path:
    """The snapshot of `hub_id` in the local hub cache, downloaded when it is not there whole."""
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    nothing = f"no weights for {entry.name}: "
    ways_out = (
        "three ways out: put the files in a folder and pass --weights DIR; connect to the network so that they can be "
        "downloaded; or pass --weights random to measure latency without them"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import tqdm
    except (ImportError, ValueError) as error:  # ValueError: of its variables in the environment, some hold numbers
        raise CheckpointError(f"{nothing}huggingface_hub cannot be loaded ({error}); {ways_out}") from error
    try:
        cached = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
    except (OSError, RuntimeError, ValueError):
        pass  # nothing whole in the cache: the download below is the next step, not a failure
    else:
        if not _missing_files(cached):
            _refuse_damaged(cached)
            return cached

    class Bar(tqdm):
        """The client's bar, which it would draw into files and pipes as well."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            hidden = not (bars and sys.stderr.isatty())
            settings["disable"] = hidden or settings.get("disable")
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

    try:
        fetched = Path(snapshot_download(hub_id, allow_patterns=wanted, tqdm_class=Bar))
    except Exception as error:  # its client stands on two others, and no base class unites what they raise
        raise CheckpointError(
            f"{nothing}{hub_id} is not in the local hub cache and cannot be downloaded ({_reason(error)}); "
            f"{_next_step(error)}{ways_out}"
        ) from error
    # Without a connection the hub's client may hand out an unfinished download as if it were whole.
    missing = _missing_files(fetched)
    if missing:
        raise CheckpointError(
            f"{nothing}the copy of {hub_id} in the local hub cache ({fetched}, without {missing[0]}{_more(missing)}) "
            f"is incomplete and cannot be completed; {ways_out}"
        )
    _refuse_damaged(fetched)
    return fetched


def _missing_files(folder: Path) -> tuple[str, ...]:
    """The files that a snapshot names and has not; an interrupted download leaves one that has not all."""
    if not (folder / "config.json").is_file():
        return ("config.json",)
    if (folder / _SINGLE).is_file():
        return ()
    if not (folder / _INDEX).is_file():
        return (_SINGLE,)
    return tuple(sorted(name for name in _shards(folder) if not (folder / name).is_file()))


def _shards(folder: Path) -> set[str]:
    """The files that a snapshot's index names; none where there is no index that can be read."""
    try:
        weight_map = (read_object(folder / _INDEX) or {}).get("weight_map")
    except CheckpointError:
        return set()
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    # Others are refused when the checkpoint is opened; here a path from outside must not be called damaged.
    return {name for name in names if isinstance(name, str) and _is_plain_name(name)}


def _refuse_damaged(snapshot: Path) -> None:
    """Names the damaged file of a snapshot: the hub's client takes whatever bears the right name for whole."""
    single = (snapshot / _SINGLE).is_file()
    try:
        for path in (snapshot / "config.json", *(() if single else (snapshot / _INDEX,))):
            read_object(path)
        for path in (snapshot / name for name in ({_SINGLE} if single else _shards(snapshot))):
            read_header(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: delete {path.resolve()} from the hub's cache and run the same command, which then downloads "
            "this file alone"
        ) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _reason(error: Exception) -> str:
    """The first line of what went wrong underneath, with its kind."""
    root = list(_chain(error))[-1]
    lines = str(root).split("\n")
    return f"{type(root).__name__}: {lines[0].strip()[:200]}" if lines[0].strip() else type(root).__name__


def _next_step(error: Exception) -> str:
    """A way out that only some errors have, before those that all have."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    for at in _chain(error):
        if isinstance(at, OfflineModeIsEnabled):
            return ""
        if isinstance(at, GatedRepoError):
            return "ask for access on the model's page, log in with `hf auth login` and run again; or "
        if isinstance(at, HfHubHTTPError) and at.response.status_code in (401, 403, 404):
            return (
                "log in with `hf auth login`, or take HF_TOKEN and HF_ENDPOINT back if they are set, and run again; or "
            )
        if isinstance(at, OSError) and at.errno in (errno.ENOSPC, errno.EDQUOT):
            return "free some space or set HF_HOME to a folder on a larger disk, and run again to resume; or "
        no_folder = isinstance(at, PermissionError | NotADirectoryError | FileExistsError)
        no_home = type(at) is RuntimeError and "home" in str(at)  # pathlib's, where the user has none
        if no_folder or no_home or (isinstance(at, OSError) and at.errno == errno.EROFS):
            return "set HF_HOME to a folder that can be written, and run again; or "
    return "run the same command again to resume, files that arrived whole are kept; or "


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
    again = "; download it again"
    try:
        if path.exists() and not path.is_file():  # a pipe might never end
            raise CheckpointError(f"{path} is not a file; give the model's safetensors files")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            # The first 8 bytes are a length and may look like anything; behind them stands a brace, or a blank.
            length = int.from_bytes(start[:8], "little")
            if length > _MAX_HEADER_BYTES or start[8:].strip(b" \t\r\n{"):
                _refuse_other_formats(path, start)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file, whatever its name says (it starts with {start[:8]!r}){again}"
                )
            if 8 + length > size or len(start) < 8:
                raise CheckpointError(
                    f"{path} is truncated: its header alone needs more than the {size} bytes it has{again}"
                )
            file.seek(8)
            header = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing{again}") from error
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
    elif start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
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
        # Decoded here because json would also guess at UTF-16, which the format does not know.
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # ValueError: also what is no UTF-8, and numbers of too many digits
        raise CheckpointError(f"{corrupt}its header is not valid JSON ({str(error)[:120]}){again}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{corrupt}its header is not a JSON object{again}")
    about = entries.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise CheckpointError(f"{corrupt}its __metadata__ must hold text alone, got {shown(about)}{again}")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(count) is int and 0 <= count < _MOST_BYTES for count in (*shape, begin, end))
            sound = whole and isinstance(dtype, str) and begin <= end
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"{corrupt}the header entry of {shown(name)} is malformed ({shown(entry)}){again}")
        if dtype not in _BITS:
            raise CheckpointError(
                f"{corrupt}{shown(name)} has the dtype {shown(dtype)}, which the format does not know; "
                f"it knows {', '.join(_BITS)}{again}"
            )
        if (end - begin) * 8 != _elements(shape) * _BITS[dtype]:
            raise CheckpointError(
                f"{corrupt}{shown(name)} of shape {shown(list(shape))} and dtype {dtype} cannot have "
                f"{end - begin} bytes{again}"
            )
        tensors[name] = StoredTensor(path, name, shape, dtype)
        spans.append((begin, end, name))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give the model's safetensors files")
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise CheckpointError(f"{corrupt}the bytes of {shown(name)} overlap others or leave a gap{again}")
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; ValueError for a key that stands twice, of which only one could count."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} stands twice")
    return entries


def _elements(shape: tuple[int, ...]) -> int:
    """The product of a shape, stopped where no file could hold it: a hostile shape has a million dimensions."""
    count = 1
    for size in shape:
        count *= size
        if count >= _MOST_BYTES:
            return count
    return count


class FolderCheckpoint:
    """A folder in Hugging Face's layout: config.json, and one safetensors file or several with an index."""

    def __init__(self, folder: Path, entry: ModelEntry, *, label: str | None = None) -> None:
        """Checks config, files, names, shapes and dtypes; reads no weights. CheckpointError for the first fault."""
        self._folder = folder
        self._label = label or stored_name(Path(os.path.realpath(folder)))
        self._family = entry.family
        try:
            self._open(folder, entry)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be read: {error.strerror or error}; give a folder that this user may read"
            ) from error

    def _open(self, folder: Path, entry: ModelEntry) -> None:
        if not folder.exists():
            raise CheckpointError(f"the weights folder {folder} does not exist; give a folder with config.json in it")
        if not folder.is_dir():
            raise CheckpointError(
                f"--weights {folder} is a file; give the folder that holds config.json and the safetensors files"
            )
        _refuse_adapter(folder)
        config = read_object(folder / "config.json")
        if config is None:
            raise CheckpointError(f"{folder} has no config.json; give a folder in Hugging Face's layout")
        try:
            self._config = self._family.whole_config(folder, without_nulls(config))
            self._geometry: Geometry = self._family.geometry(self._config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        _check_same_model(entry, self._geometry, str(folder / "config.json"))
        self._expected = self._family.tensors(self._geometry)
        self._files, stored = _stored_tensors(folder)
        self._tensors, self._others = _by_canonical_name(folder, stored, self._expected)
        self._check_tensors(entry)
        self._unread = self._unread_tensors()

    def _check_tensors(self, entry: ModelEntry) -> None:
        # Before what is missing: such checkpoints lack tensors because others stand in for them.
        self._refuse_marked()
        expected = self._expected
        missing = [tensor for name, tensor in expected.items() if tensor.needed and not self.has(name)]
        if missing:
            others = self._family.other_layout([other.stored_name for other in self._others])
            hint = others or "download the checkpoint again"
            lacking = f"{missing[0].stored[0]}{_more(missing)}"
            raise CheckpointError(f"{self._folder} lacks the tensor {lacking} that {entry.name} needs; {hint}")
        found = [(tensor, self._tensors[name]) for name, tensor in expected.items() if name in self._tensors]
        for tensor, stored in found:
            if stored.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{stored.path}: {tensor.stored[0]} has dtype {stored.dtype}; supported: {', '.join(_FLOATS)}; "
                    "give weights that are not quantised"
                )
        wrong = [(tensor, stored) for tensor, stored in found if stored.shape != tensor.shape]
        if wrong:
            tensor, stored = wrong[0]
            more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
            fitting = [other.name for other in MODELS.values() if self._holds(other)]
            hint = f"these are the weights of {fitting[0]}" if fitting else "they belong to another model"
            raise CheckpointError(
                f"{stored.path}: {tensor.stored[0]} has shape {shown(list(stored.shape))}, but config.json and "
                f"{entry.name} want {list(tensor.shape)}{more}; {hint}"
            )

    def _holds(self, other: ModelEntry) -> bool:
        """Whether the tensors could be those of another model."""
        shapes = {stored.stored_name: stored.shape for stored in (*self._tensors.values(), *self._others)}
        return all(
            any(shapes.get(spelling) == tensor.shape for spelling in tensor.stored) for tensor in other.tensors.values()
        )

    def _refuse_marked(self) -> None:
        """Refuses tensors of adapters and of quantised weights, by their names."""
        every = (*self._tensors.values(), *self._others)
        adapter = [stored for stored in every if _ADAPTER_TENSOR.search(stored.stored_name)]
        if adapter:
            raise CheckpointError(
                f"{adapter[0].path} holds tensors of an adapter that is not merged into the weights "
                f"({shown(adapter[0].stored_name)}{_more(adapter)}); {_MERGE}"
            )
        quantised = [stored for stored in every if _QUANTISED_TENSOR.search(stored.stored_name)]
        if quantised:
            raise CheckpointError(
                f"{quantised[0].path} holds weights that are already quantised "
                f"({shown(quantised[0].stored_name)}{_more(quantised)}); "
                "pruneport quantises by itself, give it the float16, bfloat16 or float32 weights"
            )

    def _unread_tensors(self) -> tuple[str, ...]:
        """Names of tensors that nobody reads; CheckpointError for one that lies inside a part of the model."""
        meant = [stored for stored in self._others if self._family.stray(stored.stored_name)]
        if meant:
            stored = meant[0]
            raise CheckpointError(
                f"{stored.path} holds {shown(stored.stored_name)}{_more(meant)}, which would change the answers, "
                "but a model as config.json describes it has no such tensor; "
                f"{self._family.stray(stored.stored_name)}"
            )
        return tuple(stored.stored_name for stored in self._others)

    @property
    def family(self) -> Family[Any]:
        """The architecture that the weights are for."""
        return self._family

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json."""
        return self._config

    @property
    def geometry(self) -> Geometry:
        """The sizes that config describes."""
        return self._geometry

    @property
    def folder(self) -> Path | None:
        """Where the checkpoint lies."""
        return self._folder

    def names(self) -> tuple[str, ...]:
        """Canonical names of the model's tensors that are there."""
        return tuple(name for name in self._expected if self.has(name))

    def has(self, name: str) -> bool:
        """Whether the tensor is there, under whatever spelling; a tied output matrix is there as the embedding."""
        return self._alias(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._find(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the dtype it is stored in."""
        found = self._find(name)
        return _finite(_read(found, lambda file: file.get_tensor(found.stored_name)), found)

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Reads a few rows of a matrix."""
        import torch

        found = self._find(name)

        def chosen(file: Any) -> torch.Tensor:
            matrix = file.get_slice(found.stored_name)
            return torch.cat([matrix[index : index + 1] for index in indices])

        return _finite(_read(found, chosen), found)

    def unread(self) -> tuple[str, ...]:
        """Names of tensors that belong to none of the model's parts, as the files spell them."""
        return self._unread

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
        expected = self._expected.get(name)
        if name in self._tensors or expected is None or expected.instead is None:
            return name
        return expected.instead

    def _find(self, name: str) -> StoredTensor:
        found = self._tensors.get(self._alias(name))
        if found is None:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        return found


def _more(names: Sequence[object]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter in it, alone or beside the weights that it was trained for."""
    found = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    if found:
        raise CheckpointError(f"{folder} holds an adapter that is not merged into weights ({found[0]}); {_MERGE}")


def _stored_tensors(folder: Path) -> tuple[tuple[Path, ...], list[StoredTensor]]:
    """All weight files of a folder and what they hold."""
    single, index_path = folder / _SINGLE, folder / _INDEX
    if single.exists() or single.is_symlink():
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
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{index_path} names the file {shown(shard)}; only plain file names in that folder are read"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path} names {shown(shard)}, which is not a safetensors file; pickles are refused"
            )
        if shard not in headers:
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise CheckpointError(
                f"{index_path} says that {shard} holds {name if name.isprintable() else shown(name)}, but it does not; "
                "the index belongs to other files: download the checkpoint again"
            )
    # All that the files hold, as transformers reads them: an index that forgets a tensor hides none.
    stored = [tensor for header in headers.values() for tensor in header.values()]
    return tuple(folder / shard for shard in sorted(headers)), stored


def _is_plain_name(name: str) -> bool:
    """Whether `name` is a file's own name, on any system, that can be printed and encoded."""
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and name not in (".", "..") and name.isprintable() and len(name) <= _LONGEST_FILE_NAME


def _by_canonical_name(
    folder: Path, stored: Sequence[StoredTensor], expected: Mapping[str, TensorEntry]
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """The model's tensors by canonical name, and what else is stored but constants."""
    canonical = {spelling: name for name, entry in expected.items() for spelling in entry.stored}
    tensors: dict[str, StoredTensor] = {}
    others = []
    for tensor in stored:
        name = canonical.get(tensor.stored_name)
        if name is None:
            if not tensor.stored_name.endswith(_CONSTANTS):
                others.append(tensor)
            continue
        if name in tensors:
            raise CheckpointError(
                f"{folder} holds {expected[name].stored[0]} twice, as {tensors[name].stored_name} and "
                f"{tensor.stored_name}; files of two checkpoints are mixed: download it again"
            )
        tensors[name] = tensor
    return tensors, others


def _check_same_model(entry: ModelEntry, geometry: Geometry, where: str) -> None:
    """Raises CheckpointError when `geometry`, read from `where`, is not the geometry of `entry`."""
    expected, got = entry.geometry.numbers(), geometry.numbers()
    if expected == got:
        return
    differing = [f"{name} {got[name]} instead of {expected[name]}" for name in expected if expected[name] != got[name]]
    match = [name for name, other in MODELS.items() if other.family is entry.family and other.geometry.numbers() == got]
    hint = f"these are the weights of {match[0]}: say --model {match[0]}" if match else f"give weights of {entry.name}"
    raise CheckpointError(f"{where} is not {entry.name}: {', '.join(differing)}; {hint}")


def _read(stored: StoredTensor, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What `read` takes out of the tensor's opened file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(stored.path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.path} cannot be read as safetensors: {error}; download it again") from error


def _finite(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    import torch

    # A sum is finite only if all terms are; float64 keeps large but sound values from overflowing it.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise CheckpointError(
            f"{stored.path} is corrupt: {stored.stored_name} holds NaN or infinite values; download it again"
        )
    if tensor.dtype == torch.float64 and not torch.isfinite(tensor.float()).all():
        raise CheckpointError(
            f"{stored.path}: {stored.stored_name} holds values that no float32 can; give the float32 weights"
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

    Each block of a tensor depends on (seed, published name, block number) alone, so any part can be made without the
    rest.
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
        self._tensors = entry.tensors

    @property
    def family(self) -> Family[Any]:
        """The architecture that the weights are for."""
        return self._entry.family

    @property
    def config(self) -> Mapping[str, Any]:
        """The config the model was published with."""
        return self._entry.config

    @property
    def geometry(self) -> Geometry:
        """The sizes that config describes."""
        return self._entry.geometry

    @property
    def folder(self) -> Path | None:
        """None: there are no files."""
        return None

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors."""
        return tuple(self._tensors)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of that name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        try:
            return self._tensors[name].shape
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

    def unread(self) -> tuple[str, ...]:
        """None: only what the model has is drawn."""
        return ()

    def identity(self) -> WeightsInfo:
        """Marked as random; the hash stands for the recipe, the seed and the shapes, which decide every number."""
        from runtime.bundle import WeightsInfo

        shapes = [(entry.stored[0], entry.shape) for entry in self._tensors.values()]
        recipe = json.dumps([self._RECIPE, self._seed, shapes])
        return WeightsInfo(
            source="random",
            id=f"{self._entry.name} with random weights",
            sha256=hashlib.sha256(recipe.encode()).hexdigest(),
            seed=self._seed,
        )

    def _block(self, name: str, number: int) -> torch.Tensor:
        import torch

        drawn_by = self._tensors[name].stored[0]
        digest = hashlib.sha256(f"{self._RECIPE}/{self._seed}/{drawn_by}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        size = min(self._BLOCK, math.prod(self.shape(name)) - number * self._BLOCK)
        return torch.empty(size).normal_(0.0, self._spread(name), generator=generator)

    def _spread(self, name: str) -> float:
        shape = self.shape(name)
        if name.endswith(".bias"):
            return 0.02
        if "embed" in name and "patch" not in name:
            return 0.5
        inputs = math.prod(shape[1:])
        # Branches that end in the residual stream are kept small, or its spread would grow with every layer.
        damped = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
        return (0.25 if damped else 1.0) / math.sqrt(inputs)
