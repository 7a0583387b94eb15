"""Pictures and tables from recorded runs: `python -m bn_jax.figures`. Each figure has a file."""
