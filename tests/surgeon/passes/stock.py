"""What the passes are compared with: the stock transformers model, run whole, without anything of the passes."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from surgeon.models.quiet import quiet_transformers


def load_stock(path, dtype=torch.float32):
    """The model as anyone would load it."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def token_losses(model, tokens):
    """Negative log-likelihood of every predicted token, float64, `[n_sequences, length - 1]`."""
    log_probabilities = model(tokens).logits[:, :-1].double().log_softmax(dim=-1)
    return -log_probabilities.gather(2, tokens[:, 1:, None])[..., 0]


def stock_tokens(path, sequences, blocks_path, next_tokens=None):
    """Input and output gradient of every token, by full name of a linear: `[n_tokens, n]` float64 each.

    Args:
        path: of the checkpoint; the whole model runs in float64.
        sequences: `[n_sequences, length]`.
        blocks_path: where the blocks are.
        next_tokens: targets `[n_sequences, length - 1]` instead of those of the text.

    Returns:
        Inputs, gradients, and the gradients of the weights.
    """
    model = load_stock(path, torch.float64)
    tokens = torch.from_numpy(sequences)
    inputs, outputs, modules = {}, {}, {}

    def keep(name):
        def hook(_module, args, output):
            output.retain_grad()
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks_path}."):
            module.register_forward_hook(keep(name))
            modules[name] = module
    targets = tokens[:, 1:] if next_tokens is None else next_tokens
    log_probabilities = model(tokens).logits[:, :-1].log_softmax(dim=-1)
    (-log_probabilities.gather(2, targets[..., None])).sum().backward()
    return (
        {name: x.flatten(0, -2) for name, x in inputs.items()},
        {name: y.grad.flatten(0, -2) for name, y in outputs.items()},
        {
            name: (linear.weight.grad, None if linear.bias is None else linear.bias.grad)
            for name, linear in modules.items()
        },
    )


@dataclass
class StockCurvature:
    """One forward and backward of all sequences at once, recorded with hooks.

    Attributes:
        activations: full name of a linear → mean over all tokens of a aᵀ, float64.
        mean_inputs: the same for a.
        gradients: the same for g gᵀ.
        block_inputs: input of every block, `[n_sequences, length, width]`.
        block_gradients: gradient of the summed loss there.
    """

    activations: dict[str, torch.Tensor]
    mean_inputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    block_inputs: list[torch.Tensor]
    block_gradients: list[torch.Tensor]


def stock_curvature(path, sequences, blocks_path):
    """Curvature of all linears inside the blocks; weights have gradients here, as in any training step."""
    model = load_stock(path)
    tokens = torch.from_numpy(sequences)
    inputs, outputs, block_inputs = {}, {}, []

    def keep(name):
        def hook(_module, args, output):
            output.retain_grad()
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    def keep_block(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.retain_grad()
        block_inputs.append(hidden)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks_path}."):
            module.register_forward_hook(keep(name))
    for block in model.get_submodule(blocks_path):
        block.register_forward_pre_hook(keep_block, with_kwargs=True)
    token_losses(model, tokens).sum().backward()
    return StockCurvature(
        activations={name: _mean_outer(x) for name, x in inputs.items()},
        mean_inputs={name: x.flatten(0, -2).double().mean(dim=0) for name, x in inputs.items()},
        gradients={name: _mean_outer(y.grad) for name, y in outputs.items()},
        block_inputs=[hidden.detach() for hidden in block_inputs],
        block_gradients=[hidden.grad for hidden in block_inputs],
    )


def _mean_outer(x):
    rows = x.flatten(0, -2).double()
    return rows.T @ rows / len(rows)


def relative(found, expected):
    """Relative difference in the Frobenius norm."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
