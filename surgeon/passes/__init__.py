"""Passes through a causal language model one group of blocks at a time."""
