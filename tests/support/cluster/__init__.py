"""Real SLURM, pods and network hosts on one machine."""
