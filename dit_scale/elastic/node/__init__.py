"""One node from the inside: its ranks, started, watched, diagnosed and ended."""
