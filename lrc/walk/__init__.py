"""A model's decoder layers one at a time, forward with hidden states or backward with gradients."""
