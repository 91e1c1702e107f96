"""From a checkpoint to a bundle: names become objects, a graph is built, lowered, written and checked."""
