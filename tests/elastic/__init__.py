"""Tests of supervision with real supervisors, launchers and ranks on this machine, killed in every way."""
