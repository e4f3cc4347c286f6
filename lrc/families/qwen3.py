"""Qwen3 (arXiv:2505.09388): the layout of Qwen2 without biases; every query and key head is normed before it turns."""

from dataclasses import replace

from lrc.families.qwen2 import FAMILY as QWEN2

FAMILY = replace(QWEN2, model_type="qwen3", qk_norm="head", tiny={**QWEN2.tiny, "head_dim": 8})
