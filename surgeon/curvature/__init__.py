"""Curvature of the loss with respect to the linears of a block, from activations and gradients."""
