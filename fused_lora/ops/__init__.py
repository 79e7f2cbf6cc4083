"""One adapted product: validation, autograd, dispatch, and the implementations behind it."""
