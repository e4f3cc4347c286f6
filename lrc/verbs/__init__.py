"""One function a verb: what ``import lrc`` offers."""
