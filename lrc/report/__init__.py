"""The typed result of a compression, and its JSON and Markdown forms."""
