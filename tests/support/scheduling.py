"""How `pytest -n 3` distributes the tests over its processes."""

from xdist.scheduler import LoadScopeScheduling

SERIAL_FOLDERS = ("tests/elastic/", "tests/cluster/", "tests/storm/")
"""Tests in these folders start many processes and mostly wait for deadlines, leases and servers."""


class FolderScheduling(LoadScopeScheduling):
    """Run the tests of a serial folder one after the other, in parallel with files of other folders."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in SERIAL_FOLDERS if nodeid.startswith(folder)), file)
