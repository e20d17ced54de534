"""Things that break on purpose: disks, servers, clocks."""
