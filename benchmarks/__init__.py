"""Side-by-side timings and measured failures of peers, one command each."""
