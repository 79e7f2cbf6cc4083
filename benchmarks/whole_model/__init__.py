"""Training steps of whole models: trainers, loss curves, memory of a process."""
