"""Injected faults: disks, servers, clocks."""
