"""All that is known about LLaVA-1.5 and its CLIP tower; `family` is what the outside is given."""
