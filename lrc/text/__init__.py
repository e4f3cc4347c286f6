"""Turn data sets and files into token blocks: ``datasets`` and ``files``, then ``source``, then ``blocks``."""
