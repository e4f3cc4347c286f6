"""One function for each verb: what ``import lrc`` offers."""
