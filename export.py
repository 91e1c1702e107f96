"""Launches `pruneport export` from a checkout: `python export.py --model ... --keep N --target android`."""

import sys

from pruneport import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
