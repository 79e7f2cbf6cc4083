"""The first quarter of an hour on a GPU: the steps of gpu_acceptance.py."""
