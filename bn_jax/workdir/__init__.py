"""What lies in a workdir: records, checkpoints, the lock."""
