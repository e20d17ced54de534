"""What survives of a save after a power cut, and of stored objects after damage."""
