"""Preparing and checking data sets: `python -m bn_jax.prepare`."""
