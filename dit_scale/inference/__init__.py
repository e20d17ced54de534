"""Weights and pictures: everything that reads a finished model."""
