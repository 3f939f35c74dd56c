"""Draft trees: their first choices, depths and accepted paths."""

from __future__ import annotations

from aurora_lit.modules.sampling.tree import accepted_path, common_prefix_length, depths, first_choices


def test_first_choices_depths_and_paths() -> None:
    parents = [0, 0, 2, 1, 1]  # columns 1 and 2 follow the root; 3 follows 2; 4 and 5 follow 1
    assert first_choices(parents) == [1, 4]
    assert depths(parents) == [0, 1, 1, 2, 2, 2]
    tokens = [5, 7, 8, 8, 9]
    assert accepted_path(tokens, parents, [5, 9, 0, 0, 0, 0]) == [1, 5]
    assert accepted_path(tokens, parents, [7, 9, 8, 0, 0, 0]) == [2, 3]
    assert accepted_path(tokens, parents, [3, 9, 8, 0, 0, 0]) == []
    assert first_choices([]) == accepted_path([], [], [4]) == []


def test_a_chain_is_accepted_up_to_its_first_wrong_token() -> None:
    assert accepted_path([5, 7, 8], None, [5, 7, 8, 9]) == [1, 2, 3]
    assert accepted_path([5, 7, 8], None, [5, 6, 8, 9]) == [1]
    assert accepted_path([5, 7, 5], None, [4, 5, 7, 5]) == [], "a later token that is right does not count"
    assert accepted_path([], None, [4]) == []


def test_common_prefixes() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2]) == 2
    assert common_prefix_length([1, 2], [3]) == 0
