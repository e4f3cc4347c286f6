"""Turn data sets and files into token blocks: ``source``, ``mixture``, ``corpus``, ``blocks``."""
