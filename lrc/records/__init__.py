"""Every result as a typed record."""
