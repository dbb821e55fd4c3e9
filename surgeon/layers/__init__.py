"""Which layers go whole: patterns by position, and scores of blocks and of their sub-layers."""
