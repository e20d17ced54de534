"""Predict a run on machines that fail: a formula, and the real supervisors on a virtual clock."""
