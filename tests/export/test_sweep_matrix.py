"""A matrix of flags: which cells it makes, and what is refused before anything runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from export.request import Request
from export.sweep.matrix import MOST_BYTES, MOST_CELLS, as_flags, as_request, read_matrix
from runtime.errors import ExportError, RequestError


def matrix(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_cells_are_the_product_and_the_last_flag_varies_fastest(tmp_path: Path) -> None:
    path = matrix(tmp_path, "model: pocket\nkeep: [64, all]\nbackend:\n  - onnx\n  - xnnpack\n")
    assert read_matrix(path) == (
        {"model": "pocket", "keep": "64", "backend": "onnx"},
        {"model": "pocket", "keep": "64", "backend": "xnnpack"},
        {"model": "pocket", "keep": "all", "backend": "onnx"},
        {"model": "pocket", "keep": "all", "backend": "xnnpack"},
    )


def test_a_list_of_mappings_is_the_cells_of_all(tmp_path: Path) -> None:
    path = matrix(tmp_path, "- {model: pocket, keep: &keeps [8, 16]}\n- {model: pocket, keep: *keeps, cut: 0}\n")
    assert [list(cell.values()) for cell in read_matrix(path)] == [
        ["pocket", "8"],
        ["pocket", "16"],
        ["pocket", "8", "0"],
        ["pocket", "16", "0"],
    ]


def test_the_examples_of_the_page_are_what_it_says(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "sweeps.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [len(read_matrix(matrix(tmp_path, text))) for text in examples] == [12, 5]
    assert "12 here" in page
    assert f"at most {MOST_CELLS}\ncells" in page


@pytest.mark.parametrize(
    "word", ["010", "1_000", "1e3", "12:30", "2026-01-31", "no", "null", "192,128,64", "~", "0x10"]
)
def test_words_are_what_stands_there(word: str, tmp_path: Path) -> None:
    """YAML would read a number, a date, a truth or nothing in them."""
    path = matrix(tmp_path, f"model: pocket\nkeep: [{word!r}, 7]\ncut: {word}\n")
    assert [(cell["keep"], cell["cut"]) for cell in read_matrix(path)] == [(word, word), ("7", word)]


def test_a_cell_is_the_request_that_the_command_line_makes(tmp_path: Path) -> None:
    (words,) = read_matrix(matrix(tmp_path, "model: pocket\nkeep: 8\nquant-text: none\ntwin: true\nforce: false\n"))
    expected = Request(model="pocket", keep="8", target="android", quant_text="none", twin=True, output_dir="out")
    assert as_request(words, Path("out")) == expected
    assert as_flags(words) == ("--model=pocket", "--keep=8", "--quant-text=none", "--twin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write lines such as `keep: [64, 128]`"),
        ("[]", "is empty; write lines such as"),
        ("# nothing\n", "is empty; write lines such as"),
        ("pocket", "line 1 is a scalar, not a mapping; write lines such as"),
        ("- [pocket]", "line 1 is a sequence, not a mapping"),
        ("model: pocket\nkep: 3", "line 2: unknown key 'kep', did you mean 'keep'?; allowed: model, keep, target"),
        ("model: pocket\nquant_text: int4", "unknown key 'quant_text', did you mean 'quant-text'?"),
        ("model: pocket\noutput-dir: out", "unknown key 'output-dir'; allowed: "),
        ("model: pocket\n<<: {keep: 3}", "unknown key '<<'"),
        ("model: pocket\n? [keep]\n: 3", "line 2: unknown key 'a sequence'"),
        ("model: pocket\nkeep: []", "line 2: keep is an empty list, which makes no cell"),
        ("model: pocket\nkeep:", "line 2: keep has no word; give it one, or leave keep out"),
        ("model: pocket\nkeep: [64, '']", "line 2: keep has no word"),
        ('model: pocket\nkeep: "6\\04"', "line 2: keep has no word"),
        ("model: pocket\nkeep: {least: 1}", "line 2: keep holds a mapping; it takes a word or a list of words"),
        ("model: pocket\nkeep: [[1, 2]]", "line 2: keep holds a sequence; it takes"),
        ("model: pocket\nkeep: 3\ntwin: yes", "line 3: twin='yes' must be true or false"),
        ("model: pocket\nkeep: 3\nkeep: 4", "line 3 names keep a second time; name it once, with a list of words"),
        ("model: pocket", "line 1 has no keep; every cell needs model and keep"),
        ("- {model: pocket, keep: 3}\n- {keep: 3}", "line 2 has no model; every cell needs model and keep"),
        ("model: pocket\nkeep: [64, 32, 64]", "makes a cell twice, model=pocket keep=64 (cells 1 and 3); name it once"),
        ("- {model: pocket, keep: 3}\n- {keep: 3, model: pocket}", "makes a cell twice, keep=3 model=pocket (cells 1"),
        ("model: [pocket", "is no YAML: expected ',' or ']', but got '<stream end>' (line 1, column 15); write lines"),
        (
            "model: pocket\n\tkeep: 3",
            "is no YAML: found character '\\t' that cannot start any token (line 2, column 1)",
        ),
        ("a: 1\n---\nb: 2", "is no YAML: but found another document (line 2, column 1)"),
        ("model: \x07", "is no YAML: unacceptable character #x0007"),
        ("keep: *nowhere", "is no YAML: found undefined alias 'nowhere'"),
        ("[" * 5000, "is nested too deeply; write lines"),
        (f"model: pocket\nkeep: {list(range(100))}\nseed: {list(range(6))}", f"makes 600 cells, at most {MOST_CELLS}"),
    ],
)
def test_what_is_no_matrix(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_matrix(matrix(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "matrix.yaml"))
    assert message in str(caught.value)


def test_a_product_beyond_all_memory_is_only_counted(tmp_path: Path) -> None:
    many = "[" + ", ".join(map(str, range(999))) + "]"
    flags = ("keep", "backend", "cut", "seed", "precision", "method", "only")
    with pytest.raises(RequestError, match="at most"):
        read_matrix(matrix(tmp_path, "model: pocket\n" + "".join(f"{flag}: {many}\n" for flag in flags)))


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"nothing\.yaml cannot be read: No such file or directory; give a YAML file"
    ):
        read_matrix(tmp_path / "nothing.yaml")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_matrix(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RequestError, match="is no text in UTF-8"):
        read_matrix(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(RequestError, match="which no matrix has; split it"):
        read_matrix(tmp_path / "large.yaml")


def test_yaml_that_cannot_be_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ExportError, match=re.escape("is not installed here; run: pip install 'pruneport[export]'")):
        read_matrix(matrix(tmp_path, "model: pocket\nkeep: 3\n"))
