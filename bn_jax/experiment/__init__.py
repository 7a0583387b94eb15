"""Turns a config into what a run needs: mesh, data, model, numbers, compiled programs."""
