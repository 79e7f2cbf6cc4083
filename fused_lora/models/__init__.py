"""Whole models: which modules are adapted, their parameters, merging, named adapters."""
