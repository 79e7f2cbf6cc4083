"""Memory traffic of peers, modelled from their published code."""
