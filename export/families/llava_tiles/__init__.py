"""All that is known about LLaVA-NeXT and LLaVA-OneVision; `family` is what the outside is given."""
