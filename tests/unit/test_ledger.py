"""The ledger of wall-clock time: sums, goodput, and headings that a run cannot observe."""

import json

from dit_scale.ledger import Heading, Ledger

SPENT = {Heading.STOPPED: 1, Heading.PRODUCTIVE: 6, Heading.DATA: 1}
LEDGER = Ledger(100, 108, SPENT, units_per_s=4)


def test_seconds_and_goodput() -> None:
    assert (LEDGER.wall, LEDGER.wall_s, LEDGER.goodput) == (8, 2.0, 0.75)
    assert LEDGER.seconds(Heading.PRODUCTIVE) == 1.5
    assert LEDGER.seconds(Heading.PRODUCTIVE, Heading.DATA) == 1.75
    assert LEDGER.seconds(*Heading) == LEDGER.wall_s


def test_a_heading_that_cannot_be_observed_is_absent_from_json_and_counts_as_zero() -> None:
    assert json.loads(json.dumps(LEDGER.by_name())) == {"stopped": 0.25, "productive": 1.5, "data": 0.25}
    assert LEDGER.seconds(Heading.DEGRADED) == 0.0


def test_a_run_that_took_no_time_has_no_goodput() -> None:
    assert Ledger(5, 5, {Heading.PRODUCTIVE: 0}, units_per_s=1).goodput == 0.0
