"""Where models come from: names, downloads, and the hook by which transformers loads compressed ones."""
