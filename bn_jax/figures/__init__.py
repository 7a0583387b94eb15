"""Pictures and tables from recorded runs: `python -m bn_jax.figures`; one file a figure."""
