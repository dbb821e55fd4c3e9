"""First-order correction between shots: what training a little can still win on a pruned model."""
