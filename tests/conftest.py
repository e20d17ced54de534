"""Settings of all tests."""

from hypothesis import settings

# The same examples every time, and no test fails because a machine was slow.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
