"""VLM-Pruner, arXiv 2512.02700: the paper's loop, two static forms that decide alike, and its constants."""
