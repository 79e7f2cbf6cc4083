"""Shared by all benchmarks: shapes, timing, the machine's description, the command line."""
