"""PEFT: its layers on this library's kernels, and its file format."""
