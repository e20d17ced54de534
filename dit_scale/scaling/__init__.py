"""The design space of the paper: many short runs, and how quality follows from compute."""
