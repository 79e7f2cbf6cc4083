"""Choosing a strategy, a sequence of kernels, for a shape: the tuned one, else the modelled one."""
