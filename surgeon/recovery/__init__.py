"""Recovery: training a pruned model so that it makes up for what was removed, with its sparsity kept."""
