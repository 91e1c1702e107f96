"""Devices that run bundles and tell what came of it; one file each."""
