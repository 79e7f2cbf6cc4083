"""The adapted linear product: validation, autograd, dispatch, and its implementations."""
