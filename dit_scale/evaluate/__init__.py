"""Scores of generated images: feature networks, mergeable statistics, metrics, references, the score card."""
