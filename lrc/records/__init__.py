"""Results as typed records."""
