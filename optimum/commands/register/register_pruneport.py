"""`optimum-cli export pruneport`: optimum loads every file of this folder, whichever distribution brought it."""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class PruneportExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum ships no types
    """Hands its words to pruneport's own parser, so that flags, help and messages are written once."""

    COMMAND = CommandInfo(name="pruneport", help="Export a phone-ready bundle whose image tokens are pruned.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Takes every word as it stands: with no prefix character none is an option here, not even --help."""
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Exports, and ends the process with pruneport's exit code."""
        # Not above: optimum loads this file at every start, for every other command too.
        from pruneport import main

        sys.exit(main(["export", *self.args.words], optimum=True))


REGISTER_COMMANDS = [(PruneportExportCommand, ExportCommand)]
