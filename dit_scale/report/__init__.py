"""What a run was and is: read from what it wrote."""
