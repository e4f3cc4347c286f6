"""docs/families.md is what the families say, and on trained models a3 costs less than whitened_svd in all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import divergences, page_text, train

from lrc.families import families

ROOT = Path(__file__).parents[2]


def test_the_page_of_families_is_current() -> None:
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page_text()


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize("family", sorted(families()))
def test_a3_diverges_less_than_whitened_svd_at_the_same_weights(tmp_path: Path, family: str) -> None:
    train(family, tmp_path / family, 400)
    found = divergences(tmp_path / family, tmp_path)
    assert 0 < found["a3"] < found["whitened_svd"]
