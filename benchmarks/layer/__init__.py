"""One layer: the providers that are compared, their time and their memory."""
