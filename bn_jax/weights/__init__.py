"""Weights in and out: files of tensors, other networks' names, inference networks as files."""
