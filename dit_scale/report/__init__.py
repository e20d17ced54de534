"""Reports about a run, from the files that it has written."""
