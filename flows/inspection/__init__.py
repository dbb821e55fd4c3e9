"""Looking into a store, a run or a layer: what `surgeon inspect` shows."""
