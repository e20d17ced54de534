"""Nodes for tests: real and virtual supervisors."""
