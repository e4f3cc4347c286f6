"""Pictures of reports and tables as SVG: one file a picture, each a function from figures to SVG text."""
