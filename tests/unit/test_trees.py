"""Nested JSON objects by dotted keys."""

from dit_scale.trees import differing, flat


def test_values_have_dotted_keys_in_their_order() -> None:
    tree = {"b": {"d": 1, "c": {"e": None}}, "a": [1, 2], "ema": [{"name": "x"}, {"name": "y", "decay": 0.5}]}
    assert list(flat(tree).items()) == [
        ("b.d", 1),
        ("b.c.e", None),
        ("a", [1, 2]),
        ("ema.0.name", "x"),
        ("ema.1.name", "y"),
        ("ema.1.decay", 0.5),
    ]


def test_empty_and_mixed_lists_are_values() -> None:
    assert flat({"a": [], "b": [{"c": 1}, 2]}) == {"a": [], "b": [{"c": 1}, 2]}


def test_only_keys_that_differ_are_named() -> None:
    trees = [
        {"a": 1, "b": {"c": 2, "d": [3]}},
        {"a": 1, "b": {"c": 4, "d": [3]}},
        {"a": 1, "e": None, "f": 0},
    ]
    assert differing(trees) == {"b.c": [2, 4, None], "b.d": [[3], [3], None], "f": [None, None, 0]}
    assert differing([trees[0], trees[0]]) == {}
