"""Files of a checkpoint folder beside its weights, read as transformers reads them; and the pocket model's recipe."""
