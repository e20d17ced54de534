"""The choice of mutants, and the exclusion of changes without effect."""

from pathlib import Path

import pytest

from tests.mutants import __main__ as mutants
from tests.mutants import equivalent
from tests.mutants.sample import LEFT_OUT, Mutant, choose, essence, places_of, shares_of
from tests.mutants.trial import Verdict

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Text."""
import math

LIMIT = 3


def area(radius: float | None = None, *, text: str = "") -> float | None:
    """More text."""
    assert radius is not None, f"{1 + 1} is missing"
    if radius < 0:
        raise ValueError(f"radius {radius + 0}: expected 0 or more")
    return math.pi * radius**2
'''


def test_what_changes_nothing_is_no_mutant() -> None:
    original = essence(SOURCE)
    for old, new in (
        ("float | None = None", "float + None = None"),
        ("-> float | None", "-> float"),
        ("is not None, f", "is None, f"),
        ("{1 + 1}", "{1 - 1}"),
        ("{radius + 0}", "{radius - 0}"),
        ("LIMIT = 3", "LIMIT =  3  # metres"),
    ):
        assert old in SOURCE
        assert essence(SOURCE.replace(old, new)) == original
    for old, new in (
        ("< 0", "<= 0"),
        ("pi *", "pi /"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("ValueError", "OSError"),
    ):
        assert old in SOURCE
        assert essence(SOURCE.replace(old, new)) != original


def test_a_sample_is_its_seed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    first, again, other = (choose(tmp_path, ["a.py"], 5, seed) for seed in (0, 0, 1))
    assert first == again
    assert {mutant.name for mutant in first} != {mutant.name for mutant in other}
    for mutant in first + other:
        assert essence(mutant.source) != essence(SOURCE)
        assert mutant.removed != mutant.added
        assert equivalent.read(f"{mutant.text}\nreason") == {mutant.name: "reason"}


def test_an_edit_changes_the_mutants_of_what_it_touches_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    before = {mutant.name for mutant in choose(tmp_path, ["a.py"], 6, 0)}
    (tmp_path / "a.py").write_text(SOURCE.replace("LIMIT = 3", "LIMIT = 30\n"))
    after = {mutant.name for mutant in choose(tmp_path, ["a.py"], 6, 0)}
    assert {name for name in before if name[1]} == {name for name in after if name[1]}


def test_no_operator_that_a_value_cannot_tell() -> None:
    used = {name for place in places_of("a.py", SOURCE) for name, _ in place.changes}
    assert "core/ReplaceComparisonOperator_Lt_LtE" in used
    assert "core/ReplaceComparisonOperator_Lt_Is" not in used
    assert "core/ReplaceBinaryOperator_Mul_Div" in used
    assert "core/ReplaceBinaryOperator_Mul_BitOr" not in used
    assert LEFT_OUT.fullmatch("core/ReplaceComparisonOperator_Is_IsNot") is None


def test_every_file_gets_its_share() -> None:
    assert shares_of({"a": 100, "b": 10, "c": 1, "d": 0}, 25) == {"a": 20, "b": 4, "c": 1, "d": 0}
    shares = shares_of({str(size): size for size in (3, 17, 40, 200)}, 100)
    assert sum(shares.values()) == 100


def test_all_files_of_the_pure_layers_are_mutated_and_have_tests() -> None:
    folders = ("models", "diffusion", "checkpoint")
    files = {
        f"{name}/{path.name}" for name in folders for path in (ROOT / "dit_scale" / name).glob("[!_]*.py")
    }
    assert set(mutants.TESTS) == files | {"data/order.py", "rng/cpu.py", "rng/plain.py", "train/objective.py"}
    assert all((ROOT / test).is_file() for file in mutants.TESTS for test in mutants.tests_of(file))


def test_the_listed_equivalents_refer_to_existing_lines() -> None:
    reasons = equivalent.read(equivalent.LIST.read_text())
    for file, _, removed, _ in reasons:
        assert removed in " ".join((ROOT / file).read_text().split())


def test_an_entry_without_a_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="expected file, definition"):
        equivalent.read("a.py, area\n- x = 1\n+ x = 2\n")


def mutant_of(line: int) -> Mutant:
    return Mutant(file="a.py", definition="area", line=line, source="", removed=f"x = {line}", added="x = 0")


@pytest.mark.parametrize(("survivors", "passed"), [(5, True), (6, False)])
def test_enough_must_be_killed(survivors: int, passed: bool) -> None:
    some = [mutant_of(line) for line in range(1, 103)]
    codes = [0] * (survivors + 2) + [1, 2, -9, None] + [1] * (96 - survivors)
    verdicts = [Verdict(code, 1.0, "") for code in codes]
    reasons = {some[0].name: "nobody reads x", some[1].name: "the same"}
    text, enough = mutants.report(some, verdicts, reasons)
    assert enough == passed
    assert f"{100 - survivors} killed (1 timed out), {survivors} survived, 2 equivalent" in text
    assert "a.py:1: survived, listed as equivalent\na.py, area\n- x = 1\n+ x = 0\n" in text
    assert "a.py:3: survived\n" in text


def test_a_killed_mutant_is_not_equivalent() -> None:
    mutant = mutant_of(1)
    text, enough = mutants.report([mutant], [Verdict(1, 1.0, "")], {mutant.name: "nobody reads x"})
    assert not enough
    assert "remove them from the file" in text
