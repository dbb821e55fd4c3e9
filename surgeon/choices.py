"""The choices a user makes by name, in parameters and in calls of the library."""

from enum import StrEnum


class Method(StrEnum):
    """A named way to choose what goes and to adapt the rest.

    All but the last two are presets of curvature, cost, update and allocation. `layerchop` removes whole blocks;
    `bonsai` learns from masked sub-models, with forward passes alone, which units matter.

    Reference: van der Ouderaa et al. 2024, *The LLM Surgeon* (`llm-surgeon`; `k-obd` and `l-obd` are its baselines with
    and without gradients); Han et al. 2015 (`magnitude`); Sun et al. 2024, *Wanda* (`wanda`); Frantar & Alistarh 2023,
    *SparseGPT* (`sparsegpt`); Jha et al. 2023, *Just CHOP* (`layerchop`); Dery et al. 2024, *Everybody Prune
    Now* (`bonsai`).
    """

    LLM_SURGEON = "llm-surgeon"
    K_OBD = "k-obd"
    L_OBD = "l-obd"
    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"
    LAYERCHOP = "layerchop"
    BONSAI = "bonsai"


class Structure(StrEnum):
    """What is removed: coupled units of a block; or of a linear rows (outputs), columns (inputs), both, or weights.

    Or whole blocks. Units are MLP neurons and key/value groups, each with everything that makes and reads it: without
    them a model is smaller.
    """

    UNITS = "units"
    ROWS = "rows"
    COLUMNS = "columns"
    ROWS_AND_COLUMNS = "rows-and-columns"
    WEIGHTS = "weights"
    BLOCKS = "blocks"


class Widths(StrEnum):
    """How many units blocks keep: equally many (`uniform`, which stock models can be), or any number (`free`)."""

    UNIFORM = "uniform"
    FREE = "free"


class Resource(StrEnum):
    """What a target is a fraction of: weights of decoder linears, parameters, or seconds of a forward pass."""

    WEIGHTS = "weights"
    PARAMETERS = "parameters"
    SECONDS = "seconds"


class Curvature(StrEnum):
    """How the curvature of the loss with respect to the weights of one linear is approximated.

    With a the input and g the gradient of the loss at the output, for each token: `identity` knows nothing,
    `activations` is ``I ⊗ mean aaᵀ``, `diagonal` is ``mean (g∘g)(a∘a)ᵀ`` by weight, `kfac` is ``mean ggᵀ ⊗ mean aaᵀ``,
    `nearest-kronecker` is the Kronecker product nearest to ``mean ggᵀ ⊗ aaᵀ``, `kronecker-sum` the nearest sum of
    several, and `ekfac` the best diagonal in the eigenbasis of `kfac`.

    Reference: Martens & Grosse 2015 (K-FAC); George et al. 2018 (EKFAC); van der Ouderaa et al. 2024, section 3.1.
    """

    IDENTITY = "identity"
    ACTIVATIONS = "activations"
    DIAGONAL = "diagonal"
    KFAC = "kfac"
    NEAREST_KRONECKER = "nearest-kronecker"
    KRONECKER_SUM = "kronecker-sum"
    EKFAC = "ekfac"


class Targets(StrEnum):
    """Next tokens the gradient of the loss is taken for: those of the text, or draws from the model's own softmax.

    `empirical` gives the empirical Fisher matrix, `sampled` an estimate of the Fisher matrix itself.
    """

    EMPIRICAL = "empirical"
    SAMPLED = "sampled"


class Cost(StrEnum):
    """What removing a structure costs: with all other weights adapted to it (`obs`) or left as they are (`obd`)."""

    OBS = "obs"
    OBD = "obd"


class Ranking(StrEnum):
    """What is compared between linears: the cost of a structure, or its cost divided by what it frees (weights)."""

    COST = "cost"
    COST_PER_WEIGHT = "cost-per-weight"


class Allocation(StrEnum):
    """Within what the cheapest structures are chosen: all linears, each linear, or each row of each linear.

    `global` lets one threshold divide the sparsity between linears; the others give each its share.
    """

    GLOBAL = "global"
    PER_LAYER = "per-layer"
    PER_ROW = "per-row"


class UpdateRule(StrEnum):
    """How the remaining weights are adapted to a removal.

    `exact` solves for all that goes from a linear together; `independent` adds up the solution for its rows and that
    for its columns (as published); `chunked` solves for a limited number of weights at a time (as published);
    `sequential` goes through the columns in order, and chooses what goes as it does (SparseGPT); `none` leaves the
    remaining weights as they are.
    """

    EXACT = "exact"
    INDEPENDENT = "independent"
    CHUNKED = "chunked"
    SEQUENTIAL = "sequential"
    NONE = "none"


class Selector(StrEnum):
    """How LayerChop chooses the layers that go whole.

    Patterns go by position alone: just after the first block, just before the last, around the middle, from both ends,
    evenly spread, or the deepest. The others read data, gradients or weights: how little a block turns the hidden
    states (`block-influence`, `angular` for a span of blocks, `llm-drop` for attention and MLP apart), the loss without
    it (`perplexity`, and `sleb` again after every removal), and what its weights are worth (`magnitude`, `taylor`,
    `curvature`).

    Reference: Jha et al. 2023, *Just CHOP* (patterns); Gromov et al. 2024, *The Unreasonable Ineffectiveness of the
    Deeper Layers* (`angular`, `deepest`); Men et al. 2024, *ShortGPT* (`block-influence`); Song et al. 2024, *SLEB*
    (`sleb`); Kim et al. 2024, *Shortened LLaMA* (`perplexity`, `taylor`, `magnitude`); He et al. 2024, *What Matters in
    Transformers?* (`llm-drop`); `curvature` is ours.
    """

    INPUT = "input"
    OUTPUT = "output"
    MIDDLE = "middle"
    BOTH = "both"
    MAX_GAP = "max-gap"
    DEEPEST = "deepest"
    BLOCK_INFLUENCE = "block-influence"
    ANGULAR = "angular"
    SLEB = "sleb"
    PERPLEXITY = "perplexity"
    TAYLOR = "taylor"
    MAGNITUDE = "magnitude"
    LLM_DROP = "llm-drop"
    CURVATURE = "curvature"


class Correction(StrEnum):
    """What is done about the gradient of the loss, which is not zero at a pruned model.

    `adapters` trains low-rank adapters after each shot and absorbs them; `newton` makes the update aim at a damped
    natural-gradient step.
    """

    NONE = "none"
    ADAPTERS = "adapters"
    NEWTON = "newton"


class Prior(StrEnum):
    """What Bonsai knows of a unit before any sub-model has run; x is the input of the output linear, W its weight.

    `wanda` is ``mean |W| · sqrt(mean x²)``, `magnitude` is ``mean |x|``, `fluctuation` is ``var(x) · ‖W‖²`` by column,
    and `random` a draw.

    Reference: Dery et al. 2024 (*Everybody Prune Now*), section 3.2; An et al. 2024, *FLAP* (`fluctuation`).
    """

    WANDA = "wanda"
    MAGNITUDE = "magnitude"
    FLUCTUATION = "fluctuation"
    RANDOM = "random"


class Utility(StrEnum):
    """What a sub-model of Bonsai is worth: minus its loss, nats per token, or minus its perplexity (as published)."""

    NEGATIVE_LOSS = "negative-loss"
    NEGATIVE_PERPLEXITY = "negative-perplexity"


class Solver(StrEnum):
    """How Bonsai regresses utilities on masks: ridge in closed form, or gradient descent stopped early (as published).

    Reference: Dery et al. 2024, section 3.3 and appendix (`adam`); `ridge` is ours.
    """

    RIDGE = "ridge"
    ADAM = "adam"


class Penalty(StrEnum):
    """What the solver `adam` of Bonsai punishes: sizes of coefficients, or squares of what they differ from a start."""

    L1 = "l1"
    L2 = "l2"


class Scope(StrEnum):
    """What one regression of Bonsai explains utilities by: masks of all sub-layers, or of one at a time."""

    GLOBAL = "global"
    PER_LAYER = "per-layer"


class SequenceOrder(StrEnum):
    """Where calibration sequences are cut: from a grid without overlap, or at independent random offsets."""

    GRID = "grid"
    RANDOM_OFFSETS = "random-offsets"


class Dtype(StrEnum):
    """Number format of the weights; the names are those of torch."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ExportLayout(StrEnum):
    """In which form a pruned model is written."""

    AUTO = "auto"
    """The smallest that is possible: stock, else compact, else dense."""
    STOCK = "stock"
    """A narrower model that stock transformers has a configuration for."""
    COMPACT = "compact"
    """Linears of the sizes that are left, with a modelling file beside them."""
    DENSE = "dense"
    """The shapes of the dense model, with exact zeros."""


class Device(StrEnum):
    """Where the model runs: `auto` takes a CUDA device when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Of products of float32 matrices in passes on a GPU: float32, or TensorFloat-32 with 10 bits of mantissa."""

    FLOAT32 = "float32"
    TF32 = "tf32"


class Keep(StrEnum):
    """Which shots keep the large payloads of their stored results: only the last one, all of them, or none."""

    LAST = "last"
    ALL = "all"
    NONE = "none"


class Recovery(StrEnum):
    """How a pruned model is trained afterwards: not at all, by low-rank adapters, all of it, or beside the dense model.

    `distill` is `full` with terms that compare the model with the dense one.

    Reference: Jha et al. 2023, *Just CHOP*, sections 3 and 5 (`full`, `distill`); Hu et al. 2022, *LoRA* (`lora`).
    """

    NONE = "none"
    LORA = "lora"
    FULL = "full"
    DISTILL = "distill"


class RecoveryPreset(StrEnum):
    """How much recovery training there is: a few batches on a processor, a day on a GPU, or as published."""

    SMOKE = "smoke"
    SMALL = "small"
    PAPER = "paper"


class LossTerm(StrEnum):
    """A term of the loss of recovery: next tokens, or how far the model is from the dense one in what it computes.

    Reference: Jha et al. 2023, *Just CHOP*, section 5 (the comparison with distillation).
    """

    LM = "lm"
    KL = "kl"
    HIDDEN = "hidden"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
