"""Support for DDP, FSDP and tensor parallelism."""
