"""The recipe of the pocket model: scenes that are rendered here, and a LLaVA that is trained on them from nothing."""
