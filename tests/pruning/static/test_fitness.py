"""What the search minimises: divergence from the dense answers, and the structural risk."""

from __future__ import annotations

import pytest

from pruning.static.fitness import StructuralRisk
from tests.pruning.static.tiny_search import Setting, prepare


@pytest.fixture(scope="module", name="setting")
def tiny_setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return prepare(tmp_path_factory.mktemp("fitness"), 4)


def test_dense_does_not_diverge_and_more_zeros_diverge_more(setting: Setting) -> None:
    assert setting.divergence(range(4)).tolist() == pytest.approx([0] * 4, abs=1e-6)
    low, middle, high = (tuple([level] * len(setting.database.names)) for level in (-2, 0, 2))
    fewest, some, most = setting.local([low, middle, high], range(4))
    assert 0 < most < some < fewest


def test_the_risk_is_the_distance_from_the_dense_weights(setting: Setting) -> None:
    database, policy = setting.database, (1, -1, *[0] * (len(setting.database.names) - 2))
    expected, total = 0.0, 0
    for name, level in zip(database.names, policy, strict=True):
        dense, entry = database.weight(name, None), database.weight(name, level)
        expected += dense.numel() * float((entry - dense).norm() ** 2 / dense.norm() ** 2)
        total += dense.numel()
    assert StructuralRisk(database)(policy) == pytest.approx(expected / total, rel=1e-4)
