"""The steps of gpu_acceptance.py, and how their results are summarised."""
