"""Members of rounds, for tests that care about a few of their fields."""

from dit_scale.elastic.board import Member


def member_of(node: str, *, boot: str = "boot", slots: int = 1, start: int = 0) -> Member:
    """Return a member of one slot, unless the test says otherwise."""
    return Member(
        node=node, boot=boot, address="127.0.0.1", port=1, slots=slots, config_sha256="digest", start=start
    )
