"""What DDP, FSDP and tensor parallelism change."""
