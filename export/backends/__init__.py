"""One file per converter; the table of targets says which phone each of them serves."""
