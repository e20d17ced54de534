"""Tests of supervision: real supervisors, launchers and ranks on this machine, ended in every way."""
