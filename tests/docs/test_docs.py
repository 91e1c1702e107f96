"""The pages of docs/ against the code; `make docs` builds them and follows their links."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import msgspec
import pytest

import pruneport
import runtime.bundle
from docs.tables import PARTS, api, backends, errors, filled, measured, named, schema
from export.backends.qnn import socs
from export.cli import build_parser, parse
from export.families import MODELS
from export.request import Request, plan
from pruning import METHODS
from runtime import golden
from runtime.bundle import Manifest, read_bundle
from runtime.errors import PruneportError
from runtime.image import load_photo

COMMAND = re.compile(r"^(?:pruneport|python export\.py|python -m pruneport|optimum-cli export pruneport) .*")


@pytest.fixture(scope="module")
def pages(root: Path) -> dict[str, str]:
    """Every page as it lies there, by its path in docs/."""
    folder = root / "docs"
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.md")}


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of every link that leads into the checkout."""
    found = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text)
    return [(str(path), str(anchor)) for path, anchor in found]


def anchors(text: str) -> set[str]:
    """What headings are called in a link."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def commands(text: str) -> list[list[str]]:
    """The command lines that a text says to type, as words."""
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    found = [re.split(r"  +#|  = ", line)[0] for line in lines]
    return [shlex.split(line) for line in found if COMMAND.match(line) and "..." not in line]


def check_flags(text: str) -> None:
    """Every flag that a text names is one of the command line's, or of the script that stands before it."""
    said = re.sub(r"(?:/usr/bin/time -v )?python benchmarks/[^`\n]*", "", text)
    said = re.sub(r"\baccelerate launch (?:[^`\n\\]|\\\n)*|\bpip install [^`\n]*", "", said)
    known = {"--help", "--version", "--strict", "--build"}  # the last ones are mypy's and CMake's
    for verb in build_parser()[1].values():
        known |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", verb.format_help()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said)) <= known


def check_commands(text: str, folder: Path) -> int:
    """Understands every command line of a text, and plans each export; returns how many there were."""
    found = commands(text)
    for words in found:
        optimum = words[0] == "optimum-cli"
        start = {"pruneport": 1, "optimum-cli": 2}.get(words[0], 3 if words[1] == "-m" else 2)
        argv = words[start:]
        if words[0] == "python" and words[1] == "export.py":
            argv = ["export", *argv]
        if optimum:
            argv = ["export", *argv[1:]]
        args = parse(argv, optimum=optimum)
        if args.verb == "export":
            chosen = {field: getattr(args, field) for field in Request.__dataclass_fields__}
            # Not every machine has the GPU, the memory and the checkpoint that a command asks for.
            here = {"output_dir": str(folder), "force": True, "reference": "auto"}
            request = Request(**{**chosen, **here})
            planned = plan(replace(request, weights=None if request.weights == "DIR" else request.weights))
            assert planned.bundle.path.parent == folder
    return len(found)


def test_parts_are_made_and_used(pages: dict[str, str]) -> None:
    asked = [name for text in pages.values() for name in named(text)]
    assert set(asked) == set(PARTS)
    assert all("[made:" not in filled(text) for name, text in pages.items() if name != "development.md")


def test_a_part_that_nothing_makes_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing makes the part 'flgas'"):
        filled("# A page\n\n[made: flgas](tables/flags.py)\n")


def test_a_part_leads_to_what_makes_it(pages: dict[str, str], root: Path) -> None:
    for name, text in pages.items():
        for path in re.findall(r"^\[made: [^\]]+\]\(([^)]+)\)$", text, re.MULTILINE):
            assert (root / "docs" / name).parent.joinpath(path).resolve().is_file(), (name, path)


def test_links_lead_somewhere(pages: dict[str, str], root: Path) -> None:
    """For readers of the plain files, too, which no tool has looked at."""
    for name, text in pages.items():
        for path, anchor in links(text):
            target = (root / "docs" / name).parent.joinpath(path) if path else root / "docs" / name
            assert target.is_file(), (name, path)
            if anchor:
                page = target.resolve().relative_to((root / "docs").resolve()).as_posix()
                assert anchor in anchors(filled(pages[page])), (name, path, anchor)


def test_every_page_is_in_the_navigation(pages: dict[str, str], root: Path) -> None:
    nav = (root / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r"- (\S+\.md)$", nav, re.MULTILINE)) == sorted(pages)


def test_flags_are_those_of_the_command_line(pages: dict[str, str]) -> None:
    for text in pages.values():
        check_flags(text)


def test_commands_are_understood(pages: dict[str, str], tmp_path: Path) -> None:
    assert sum(check_commands(text, tmp_path) for text in pages.values()) > 10


def first_cells(text: str, title: str) -> list[str]:
    """The first cell of every row of the table in a part of a page."""
    part = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("|")][2:]


def test_every_flag_is_listed(pages: dict[str, str]) -> None:
    for page, title, verb in (
        ("flags.md", "Flags of export", "export"),
        ("flags.md", "Flags of ask", "ask"),
        ("serve.md", "Flags of serve", "serve"),
        ("sweeps.md", "Flags", "sweep"),
        ("devices.md", "Flags of bench", "device bench"),
        ("devices.md", "Flags of ask on a device", "device ask"),
        ("devices.md", "Flags of report", "report"),
    ):
        listed = set(re.findall(r"--[a-z-]+", " ".join(first_cells(filled(pages[page]), title))))
        spoken = set(re.findall(r"(?<![\w-])--[a-z-]+", build_parser()[1][verb].format_help())) - {"--help"}
        assert listed == spoken


def test_every_verb_and_every_exit_code_is_listed(pages: dict[str, str]) -> None:
    text = filled(pages["flags.md"])
    for verb in build_parser()[1]:
        assert f"| `pruneport {verb}" in text
    assert first_cells(text, "Exit codes") == ["0", "1", "2", "3", "130"]


def test_every_chip_is_listed(pages: dict[str, str]) -> None:
    assert first_cells(filled(pages["flags.md"]), "Chips") == [f"`{name}`" for name in socs()]


def test_every_model_is_listed(pages: dict[str, str]) -> None:
    assert first_cells(filled(pages["flags.md"]), "Models") == [f"`{name}`" for name in MODELS]


def test_every_method_is_listed(pages: dict[str, str]) -> None:
    assert first_cells(filled(pages["flags.md"]), "Methods") == [f"`{name}`" for name in METHODS]


def test_every_tensor_of_the_golden_file_is_told(pages: dict[str, str]) -> None:
    listed = set(re.findall(r"`([\w.]+)`", pages["bundle.md"].split("\n## The golden file\n")[1]))
    of_one_kind = re.compile(r"(?:kept|recovery|answer)[_.]\w+")
    constants = {value for name, value in vars(golden).items() if name.isupper() and isinstance(value, str)}
    written = {text for text in constants if of_one_kind.fullmatch(text)}
    written |= {golden.recovery_key(part) for part in golden.RECOVERY_PARTS}
    assert written == {name for name in listed if of_one_kind.fullmatch(name)}
    assert "marks" in listed & constants


def test_every_scheme_is_explained(pages: dict[str, str]) -> None:
    cells = " ".join(first_cells(pages["flags.md"], "Quantisation schemes"))
    assert set(re.findall("`([^`]+)`", cells)) == {
        scheme
        for _, backend in backends.BACKENDS.values()
        for scheme in (*backend.quant_vision, *backend.quant_text)
        if scheme != "none"
    }


def test_every_backend_has_a_page(pages: dict[str, str]) -> None:
    for name in backends.BACKENDS:
        page = pages[f"backends/{backends.page_of(name)}"]
        assert named(page)[0] == f"choices of {name}"
        assert f"| `{name}` |" in pages["backends/index.md"]


def test_every_field_of_the_manifest_is_told(pages: dict[str, str]) -> None:
    cells = " ".join(first_cells(pages["bundle.md"], "The manifest"))
    assert set(re.findall(r"`(\w+)`", cells)) == set(Manifest.__struct_fields__)


def test_every_struct_of_the_manifest_is_specified() -> None:
    records = {
        value
        for name, value in vars(runtime.bundle).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and not name.startswith("_")
        if value.__module__ == runtime.bundle.__name__ and value is not msgspec.Struct
    }
    assert set(schema.structs()) == records
    text = schema.page()
    for struct in records:
        part = text.split(f"### {struct.__name__}\n")[1].split("\n### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(struct.__struct_fields__)


def test_every_measurement_is_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    loads = json.loads

    def watched(text: str) -> object:
        read.update(path.name for path in measured.RESULTS.glob("*.json") if path.read_text(encoding="utf-8") == text)
        return loads(text)

    monkeypatch.setattr(json, "loads", watched)
    shown = "".join(part() for part in measured.PARTS.values())
    files = sorted(measured.RESULTS.glob("*.json"))
    assert read | set(measured.ELSEWHERE) == {path.name for path in files}
    for path in files:
        if path.name not in measured.ELSEWHERE:
            assert loads(path.read_text(encoding="utf-8"))["command"] in shown, path.name


def test_tables_follow_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = measured.results("kept_tokens.json")
    result["rows"][0]["keys"] = 0.4321
    (tmp_path / "kept_tokens.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert " 0.43 |" in measured.kept_tokens()
    with pytest.raises(FileNotFoundError, match="pruner_overhead"):
        measured.cost_of_pruning()


def test_the_table_of_precisions_is_made_of_the_measurements(root: Path) -> None:
    spec = spec_from_file_location("precision", root / "benchmarks/precision.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    (result,) = measured.results("precision.json")
    text = (root / "docs/precision.md").read_text(encoding="utf-8")
    assert f"<!-- table: begin -->\n{script.table(result)}<!-- table: end -->" in text


def shape(message: errors.Message) -> re.Pattern[str]:
    """What texts a message can become."""
    parts = re.split(f"«[^»]*»|{errors.GAP}", message.text)
    return re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda folder: plan(Request(model="pokcet", keep="64", target="android")),
        lambda folder: plan(Request(model="pocket", keep="577", target="android")),
        lambda folder: plan(Request(model="pocket", keep="64", target="android", weights=str(folder / "nothing"))),
        lambda folder: parse(["exprot"]),
        lambda folder: read_bundle(folder / "nothing"),
        lambda folder: load_photo(folder / "nothing.jpg"),
    ],
    ids=["model", "keep", "weights", "verb", "bundle", "photo"],
)
def test_an_error_is_found_by_its_text(wrong: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(PruneportError) as caught:
        wrong(tmp_path)
    of_its_class = errors.messages()[type(caught.value).__name__]
    found = [message for message in of_its_class if shape(message).fullmatch(str(caught.value))]
    assert found


def test_every_class_of_errors_that_is_raised_is_told() -> None:
    found = errors.messages()
    assert {name for name, texts in found.items() if not texts} == {"PruneportError"}
    assert sum(map(len, found.values())) > 300


def test_every_public_name_is_told() -> None:
    assert sorted([*api.homes(), "__version__"]) == sorted(pruneport.__all__)
    listed = re.findall(r"^\| \[?`(\w+)`", api.names(), re.MULTILINE)
    assert sorted(listed) == sorted(pruneport.__all__)
    for name, home in api.homes().items():
        assert getattr(import_module(home), name) is getattr(pruneport, name), name


def test_the_picture_is_of_this_house(root: Path) -> None:
    picture = (root / "docs/walk.svg").read_text(encoding="utf-8")
    places = re.findall(r'class="where"[^>]*>([^<]+)<', picture)
    assert places
    for place in places:
        assert (root / place).exists(), place
    assert not re.search(r"(?:href|src|url\()", picture)


def test_files_that_pages_name_are_there(pages: dict[str, str], root: Path) -> None:
    rooms = "export|pruning|runtime|pruneport|benchmarks|docs|tests|\\.ci"
    for name, text in pages.items():
        for path in re.findall(rf"`((?:{rooms})/[\w./-]*)`", filled(text)):
            assert (root / path).exists(), (name, path)
