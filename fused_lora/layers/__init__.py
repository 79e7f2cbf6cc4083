"""Adapted layers: linear, Conv1D, embedding and convolution, with their merging and DoRA."""
