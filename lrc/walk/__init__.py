"""Run a model one decoder layer at a time, forward or backward."""
