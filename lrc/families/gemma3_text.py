"""Gemma 3's text decoder (arXiv:2503.19786): Gemma 2 with normed q and k, two rotary bases, no caps on scores."""

from dataclasses import replace

from lrc.families.gemma2 import FAMILY as GEMMA2

FAMILY = replace(
    GEMMA2,
    model_type="gemma3_text",
    qk_norm="head",
    score_cap=None,
    sdpa=True,
    old_names={"language_model.": "", "model.language_model.": "model."},
    tiny={**GEMMA2.tiny, "sliding_window_pattern": 2},
)
