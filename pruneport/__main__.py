"""Lets `python -m pruneport VERB` stand for `pruneport VERB`."""

import sys

from pruneport import main

if __name__ == "__main__":
    sys.exit(main())
