"""Next-token loss from logits, as sums over tokens."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Sum over all sequences and predicted tokens of the negative log-likelihood.

    Args:
        logits: `[n_sequences, length, n_vocabulary]`.
        input_ids: `[n_sequences, length]`; token t+1 is the target of position t.

    Returns:
        Scalar float32, nats; over ``n_sequences * (length - 1)`` predictions.
    """
    return target_loss(logits, input_ids[:, 1:].to(logits.device))


def target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The same for given targets, `[n_sequences, length - 1]` on the device of the logits."""
    predictions = logits[:, :-1].reshape(-1, logits.shape[-1])
    return cross_entropy(predictions.float(), targets.reshape(-1), reduction="sum")
