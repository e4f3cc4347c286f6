"""The loop over layers of a compression: solve, assemble, measure, refit, finish."""
