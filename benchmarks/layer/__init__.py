"""One layer: the providers that are compared, and their time and memory."""
