"""Real and virtual supervisors of nodes."""
