"""How long a run will take on machines that fail: a formula, and the real supervisors on a virtual clock."""
