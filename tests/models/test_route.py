"""What a route refuses, and the rows that it needs."""

from __future__ import annotations

from typing import Any

import pytest

from models.route import Route

ALL = (True, True, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (False, False)}, "at least one layer"),
        ({"kept_tokens": (1, 1)}, "ascending and unique"),
        ({"kept_tokens": (2, 1)}, "ascending and unique"),
        ({"kept_tokens": (4,)}, r"must lie in 0\.\.3"),
        ({"kept_tokens": (-1, 2)}, r"must lie in 0\.\.3"),
        ({"layers": (True, False, True), "frozen_layers": frozenset({1})}, "layers that run"),
        ({"frozen_layers": frozenset({3})}, "layers that run"),
        ({"token_sizes": (4,)}, "every kept token"),
        ({"token_sizes": (3, 2)}, "no more than all"),
    ],
)
def test_a_route_that_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Route(**{"visual_tokens": 4, "kept_tokens": (0, 2), "layers": ALL} | options)


def test_rows_are_those_of_kept_tokens_in_layers_that_run() -> None:
    route = Route(10, (1, 4, 9), (True, False, True))
    assert (route.dropped, route.last_layer) == (7, 2)
    assert route.rows(30) == [23, 0, 23]
    assert route.rows(30, 5) == [28, 0, 28]
