"""Provides the input: which example is seen when, where it lies, how it is decoded, distorted."""
