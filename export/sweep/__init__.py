"""Many exports at once: a matrix of flags becomes cells, each a bundle with its verdict, and one report of all."""
