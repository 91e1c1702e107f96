"""The command line, from its parser: flags, verbs, exit codes; and the models and chips that flags name."""

from __future__ import annotations

import argparse
import re

from docs.tables.markdown import table as markdown_table
from export.backends.qnn import socs
from export.cli import EXIT_CODES, build_parser
from export.families import MODELS


def _actions(verb: str) -> list[argparse.Action]:
    parser = build_parser()[1][verb]
    return [action for action in parser._actions if action.dest != "help"]


def _words(action: argparse.Action) -> str:
    """The flag as it is typed, with the word that follows it."""
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = "" if action.nargs == 0 else f" {action.metavar}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off"
    return f"`{action.default}`" if action.default not in (None, []) else ""


def table(verb: str) -> str:
    """Returns flags, meanings and defaults of one verb, as its parser has them."""
    rows = [(_words(action), str(action.help), _default(action)) for action in _actions(verb)]
    return markdown_table(("flag", "meaning", "default"), rows)


def verbs() -> str:
    """Returns what each verb does, and how it is called."""
    rows = []
    for name, parser in build_parser()[1].items():
        places = [action.metavar for action in parser._actions if not action.option_strings]
        rows.append((f"`pruneport {' '.join((name, *map(str, places)))}`", str(parser.description)))
    return markdown_table(("command", "does"), rows)


def models() -> str:
    """Returns the models that `--model` can name."""
    rows = [
        (
            f"`{entry.name}`",
            entry.summary,
            str(entry.geometry.image_tokens),
            f"`{entry.hub_id}`" if entry.hub_id else "made here",
        )
        for entry in MODELS.values()
    ]
    return markdown_table(("model", "is", "image tokens", "checkpoint"), rows)


def chips() -> str:
    """Returns the chips that `--soc` can name."""
    rows = [(f"`{soc.name}`", soc.chip, f"v{soc.htp_arch}") for soc in socs().values()]
    return markdown_table(("`--soc`", "chip", "HTP"), rows)


def exit_codes() -> str:
    """Returns the numbers that the process ends with."""
    text = " ".join(EXIT_CODES.split()).removeprefix("exit codes: ")
    rows = re.findall(r"(\d+) (.+?)(?:, (?=\d)|$)", text)
    return markdown_table(("exit code", "means"), rows)
