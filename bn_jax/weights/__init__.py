"""Imports and exports weights: files of tensors, other networks' names, networks as files."""
