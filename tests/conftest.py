"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# The same examples every time, and no test fails because a machine was slow.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
