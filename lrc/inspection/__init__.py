"""What a model is made of: spectra, moments, what methods would lose, and what an output of it has lost."""
