"""The judge: what a device gave against what the desktop gave, by bounds that are stated."""
