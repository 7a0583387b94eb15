"""Evaluation of trained networks and ensembles: `python -m bn_jax.evaluate`."""
