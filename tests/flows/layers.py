"""LayerChop in this process: a model with useless blocks, text that it predicts best of all, and shots on both."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from flows.layerchop import LayerChopShot
from flows.planning import dry_run
from flows.prune import prune
from flows.schedule import shot_target
from flows.session import Session
from flows.shot import Shot
from flows.spectra import make_spectra
from flows.stages import dense_evaluation
from surgeon.store import Reference, Store
from tests.flows.project import write_text
from tests.flows.sessions import Recorder, Runs, StoppedError
from tests.surgeon.passes.stock import load_stock, token_losses

N_BLOCKS = 6
Array = NDArray[Any]


def planted_model(folder: Path, useless: Collection[int], *, attention_only: Collection[int] = ()) -> Path:
    """A tiny Llama of 6 blocks of which some add next to nothing to the hidden states.

    Args:
        folder: where to.
        useless: blocks whose attention and MLP write almost zeros.
        attention_only: blocks whose attention alone does.
    """
    make_tiny("llama-gqa-tied", folder, num_hidden_layers=N_BLOCKS)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for block in {*useless, *attention_only}:
        for name in ["self_attn.o_proj", *(["mlp.down_proj"] if block in useless else [])]:
            tensors[f"model.layers.{block}.{name}.weight"] *= 1e-4
    tensors["model.embed_tokens.weight"] *= 2.0  # tied: sharper predictions
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def runs_on(model: Path, root: Path, **run: Any) -> Runs:
    """Runs on a model with texts of its own."""
    root.mkdir(parents=True, exist_ok=True)
    texts = {name: {"source": str(write_text(root / f"{name}.txt", s))} for s, name in enumerate(("first", "second"))}
    return Runs(
        {
            "model": {"source": str(model)},
            "calibrate": {"text": texts["first"], "sequences": 6, "length": 32},
            "evaluate": {"text": texts["second"], "windows": 4, "length": 32},
            "benchmark": {"rounds": 0},
            "report": {"new_tokens": 4},
            "run": {"engine": "inline", "batch_size": 3, "blocks_per_group": N_BLOCKS, "keep": "all"} | run,
        },
        root,
    )


def own_text(model: Path, n_sequences: int = 12, length: int = 48) -> Array:
    """Sequences drawn from the model itself: in expectation any other model predicts them worse."""
    stock = load_stock(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 260, (n_sequences, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            following = stock(tokens, use_cache=False).logits[:, -1].softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(following, 1, generator=generator)], dim=1)
    return np.asarray(tokens.numpy())


def stored_tokens(store: Store, tokens: Array) -> Reference:
    """Sequences as the store has them."""
    return store.commit("0" * 64, "sequences", {"tokens": tokens}, {}, label="calibration/sequences")


def session_of(runs: Runs, target: float = 0.3, stop_after: int | None = None, **settings: Any) -> Session:
    """A session of LayerChop; the target counts where no number of blocks is given."""
    prune = {"method": "layerchop", "structure": "blocks", "layerchop": settings}
    return runs.session(prune if "blocks" in settings else {**prune, "sparsity": target}, stop_after)


def shot_of(session: Session, calibration: Reference | None = None) -> LayerChopShot:
    """The shot of a session, on other sequences than its own if they are given."""
    given = calibration or session.calibration()
    return LayerChopShot(session, session.dense, given, 1, shot_target(session.goal.fraction, 1, 1))


def chop(
    runs: Runs, target: float = 0.3, stop_after: int | None = None, **settings: Any
) -> tuple[Shot | None, list[str]]:
    """What the prune stage gives, and the names of the tasks that were executed for it; no shot if it was stopped."""
    session = session_of(runs, target, stop_after, **settings)
    assert isinstance(session.engine, Recorder)
    shot = None
    try:
        _ = session.windows
        dense_evaluation(session)
        (shot,) = prune(session)
        make_spectra(session, shot.references, 1)
    except StoppedError:
        pass
    return shot, session.engine.ran


def planned(runs: Runs, target: float = 0.3, **settings: Any) -> list[str]:
    """Names of the tasks that a run is expected to execute."""
    return [step.name for step in dry_run(session_of(runs, target, **settings), whole=False)[0].steps]


def stock_loss(model: Path, tokens: Array, gone: Collection[int] = (), silent: Collection[str] = ()) -> float:
    """Mean loss of the stock model without some blocks, and with the outputs of some linears at zero."""
    stock = load_stock(model)
    for name in silent:
        stock.get_submodule(name).weight.data.zero_()
    layers = [layer for index, layer in enumerate(stock.model.layers) if index not in gone]
    stock.model.layers = torch.nn.ModuleList(layers)
    stock.config.num_hidden_layers = len(layers)
    stock.config.use_cache = False
    with torch.no_grad():
        return float(token_losses(stock, torch.from_numpy(tokens)).mean())
