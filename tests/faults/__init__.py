"""Real servers and the faults between them and the code under test."""
