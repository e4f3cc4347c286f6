"""Pictures of reports and tables as SVG: one file for each picture, each a function from figures to SVG text."""
