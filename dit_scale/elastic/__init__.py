"""One supervisor per node. Together they form rounds, watch the ranks, and restart after failures."""
