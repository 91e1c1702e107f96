"""Reads, checks, runs, measures and reports bundles with numpy alone: no torch, no exporter, no model code."""
