from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import held_out_blocks


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 5000, (count,), generator=torch.Generator().manual_seed(seed))


def test_another_text_gives_its_first_blocks():
    other, fitted = ids(1000, 1), ids(800).view(-1, 100)
    assert torch.equal(held_out_blocks(other, 3, fitted), other[:300].view(3, 100))


def test_the_same_text_gives_what_was_not_drawn():
    text = ids(1000)
    blocks = text.view(10, 100)
    found = held_out_blocks(text, 3, blocks[[0, 1, 3, 8]])
    assert torch.equal(found, blocks[[2, 4, 5]])


def test_too_short_a_text_says_what_it_holds():
    with pytest.raises(
        UserError, match=r"has 4 blocks of 100 tokens, fewer than the 5 .* use 4, or another text"
    ):
        held_out_blocks(ids(450, 1), 5, ids(200).view(2, 100))


def test_a_text_that_was_drawn_whole_leaves_nothing():
    text = ids(1000)
    with pytest.raises(UserError, match=r"has 0 blocks of 100 tokens besides the 10 ") as error:
        held_out_blocks(text, 2, text.view(10, 100))
    assert "use 0" not in str(error.value)


def test_a_passage_in_common_is_refused_wherever_it_stands():
    fitted, other = ids(2000).view(10, 200), ids(2000, 1)
    other[630:760] = fitted[3, 37:167]
    assert len(held_out_blocks(other, 3, fitted)) == 3
    with pytest.raises(UserError, match=r"overlaps the calibration blocks \(held-out block 3 shares 64"):
        held_out_blocks(other, 4, fitted)


@pytest.mark.parametrize("shift", [1, 7, 24, 25, 47])
def test_a_shifted_copy_is_found_in_short_blocks_too(shift):
    text = ids(480)
    with pytest.raises(UserError, match="overlaps"):
        held_out_blocks(text[shift:], 1, text.view(10, 48))


@pytest.mark.parametrize("place", [0, 1, 5, 40, 63, 64, 100, 136])
def test_a_passage_in_common_is_found_off_any_grid(place):
    fitted, other = ids(1000).view(5, 200), ids(600, 1)
    other[200 + place : 264 + place] = fitted[2, 33:97]
    assert len(held_out_blocks(other, 1, fitted)) == 1
    with pytest.raises(UserError, match=r"held-out block 1 shares 64 tokens"):
        held_out_blocks(other, 3, fitted)
    other[200 + place + 40] += 1  # 40 tokens in a row are no passage
    assert len(held_out_blocks(other, 3, fitted)) == 3
