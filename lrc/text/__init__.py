"""Data sets and files to token blocks: ``datasets`` and ``files`` to ``source`` to ``blocks``."""
