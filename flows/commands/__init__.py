"""The commands of `surgeon`, registered when imported."""
