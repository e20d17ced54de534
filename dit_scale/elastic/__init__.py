"""One supervisor per node: who takes part, when a part of the run has failed, and what follows. No torch."""
