"""The static building blocks that families assemble, written for delegates: no family is known here by name."""
