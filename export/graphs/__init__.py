"""The static modules that become exported graphs, written for delegates and filled from a checkpoint."""
