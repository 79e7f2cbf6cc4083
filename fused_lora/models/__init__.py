"""Whole models: choosing and adapting modules, parameters, merging, named adapters."""
