"""Draw calibration texts, generate synthetic text, and check that there are enough tokens."""
