"""Measurements: each script prints the table that the documents show, with the command that made it."""
