"""The input: which example is seen when, where it comes from, how it is decoded and distorted."""
