"""Whole models: trainers, loss curves, the memory of a process, results and plots."""
