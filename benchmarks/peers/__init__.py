"""Training steps of other recipes, measured side by side with ours: `python -m benchmarks.peers`."""
