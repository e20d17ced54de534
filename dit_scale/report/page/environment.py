"""Where a run ran: devices and versions, from its journal and its newest checkpoint."""

from contextlib import suppress

from dit_scale.checkpoint.manifest import CheckpointId, read_manifest
from dit_scale.errors import DitScaleError
from dit_scale.journal import Entry, Event
from dit_scale.report.status import RunContents, Status
from dit_scale.storage import open_storage

MAX_NODES = 8
"""Nodes named; the time line shows more."""


def environment_of(contents: RunContents, status: Status) -> dict[str, str]:
    """Return what is known of the environment of the newest attempt, by name."""
    start: Entry = next((e for e in reversed(contents.journal) if e["event"] == Event.START), {})
    recorded = start.get("environment", {})
    versions = recorded.get("versions") or _versions_in_checkpoint(contents)
    devices = ", ".join(f"{count} x {name}" for name, count in recorded.get("devices", {}).items())
    nodes, config = status.nodes, contents.config
    known = {
        "processes": start.get("world"),
        "devices": devices,
        "nodes": ", ".join(nodes[:MAX_NODES]) + (", ..." if len(nodes) > MAX_NODES else ""),
        "precision": config.engine.precision if config else "",
        "attention": start.get("attention"),
        **{f"{name} version": version for name, version in versions.items()},
    }
    return {name: str(value) for name, value in known.items() if value}


def _versions_in_checkpoint(contents: RunContents) -> dict[str, str]:
    """Return the versions that the newest checkpoint names; journals of earlier versions have none."""
    checkpoint = CheckpointId.parse(contents.checkpoint.rpartition("/")[2])
    if checkpoint is None or contents.config is None:
        return {}
    with suppress(DitScaleError):
        root = open_storage(contents.config.checkpoint.url or contents.config.run)
        return read_manifest(root, checkpoint).versions
    return {}
