"""Reads and writes what lies in a workdir: records, checkpoints, the lock."""
