"""Prepares and checks data sets: `python -m bn_jax.prepare`."""
