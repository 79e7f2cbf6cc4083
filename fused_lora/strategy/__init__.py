"""Which sequence of kernels a shape gets: what was tuned, else what bytes and time are modelled."""
