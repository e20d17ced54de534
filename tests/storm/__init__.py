"""Tests against real servers under injected faults."""
