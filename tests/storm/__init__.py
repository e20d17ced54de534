"""Tests on real servers while things fail."""
