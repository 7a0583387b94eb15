"""Evaluates trained networks and ensembles: `python -m bn_jax.evaluate`."""
