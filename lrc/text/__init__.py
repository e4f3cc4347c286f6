"""Turn data sets and files into token blocks: ``datasets``, ``files``, ``source``, ``mixture``, ``blocks``."""
