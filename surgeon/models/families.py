"""Descriptions by name of model families: which linears of a block belong together.

Blocks and linears are found in any model without these. What a description adds is the *coupling*: what must be removed
together so that a block stays consistent. There are two kinds of group:

- An MLP neuron: one row of each up-like linear (gate, up or fc1) and one column of the down linear.
- A key/value group: the rows of one key/value head, the rows of the query heads that attend with it, and the columns of
  the output linear that read those query heads.

A row takes its bias entry with it. Adding a family is adding one entry to `FAMILIES`.
"""

from dataclasses import dataclass
from enum import StrEnum

from surgeon.models.compact import PREFIX


class QkvLayout(StrEnum):
    """How the rows of query, key and value are laid out."""

    SEPARATE = "separate"
    """Three linears, rows ordered by head."""

    FUSED_PER_HEAD = "fused_per_head"
    """One linear; for each head in turn its query rows, key rows and value rows."""


@dataclass(frozen=True)
class AttentionNames:
    """Names of the attention linears relative to the block; all three inputs are the same name when fused."""

    query: str
    key: str
    value: str
    output: str
    layout: QkvLayout = QkvLayout.SEPARATE


@dataclass(frozen=True)
class MlpCoupling:
    """The MLP neurons of a block: neuron `i` is row `i` of every row linear and column `i` of the column linear."""

    row_linears: tuple[str, ...]
    column_linear: str


@dataclass(frozen=True)
class AttentionCoupling:
    """The key/value groups of a block.

    Attributes:
        query: Name of the query linear, relative to the block.
        key: Name of the key linear.
        value: Name of the value linear.
        output: Name of the output linear.
        n_query_heads: Number of query heads, a multiple of `n_kv_heads`.
        n_kv_heads: Number of key/value heads, which is the number of groups.
        head_dim: Rows of one head.
        layout: How query, key and value rows are laid out; `query == key == value` when fused.
    """

    query: str
    key: str
    value: str
    output: str
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    layout: QkvLayout = QkvLayout.SEPARATE

    @property
    def input_linears(self) -> tuple[str, ...]:
        """The distinct linears among query, key and value."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    def rows(self, group: int) -> dict[str, range]:
        """Returns the rows of one key/value group in each input linear.

        Args:
            group: Index of the key/value head, `0 <= group < n_kv_heads`.

        Returns:
            Name of linear → its rows in this group.
        """
        if self.layout is QkvLayout.FUSED_PER_HEAD:
            return {self.query: _span(group, 3 * self.head_dim)}
        kv_rows = _span(group, self.head_dim)
        return {self.query: self.columns(group), self.key: kv_rows, self.value: kv_rows}

    def columns(self, group: int) -> range:
        """Returns the columns of the output linear that read one key/value group."""
        return _span(group, self.n_query_heads // self.n_kv_heads * self.head_dim)


@dataclass(frozen=True)
class Family:
    """What is known by name about a family of models.

    Attributes:
        name: Name of the family, for messages and reports.
        model_types: Values of `config.model_type` it covers.
        attention: Names of its attention linears, relative to the block.
        mlp: Its MLP neurons.
        heads_are_free: Whether stock transformers builds it with heads that do not fill the width, so that a model with
            fewer key/value groups in every block has a stock configuration.
        renamed: Pairs (beginning of a tensor's name in the model, beginning in the files) where released checkpoints
            use another name than the model does.
    """

    name: str
    model_types: tuple[str, ...]
    attention: AttentionNames
    mlp: MlpCoupling
    heads_are_free: bool = True
    renamed: tuple[tuple[str, str], ...] = ()


def _span(index: int, width: int) -> range:
    return range(index * width, (index + 1) * width)


_LLAMA_ATTENTION = AttentionNames("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = MlpCoupling(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_FUSED_QKV = "attention.query_key_value"

FAMILIES = (
    Family(
        "OPT",
        ("opt",),
        AttentionNames("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        MlpCoupling(("fc1",), "fc2"),
        heads_are_free=False,
    ),
    Family("Llama", ("llama",), _LLAMA_ATTENTION, _GATED_MLP),
    Family("Mistral", ("mistral",), _LLAMA_ATTENTION, _GATED_MLP),
    Family("Qwen2", ("qwen2",), _LLAMA_ATTENTION, _GATED_MLP),
    Family("Qwen3", ("qwen3",), _LLAMA_ATTENTION, _GATED_MLP),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text"), _LLAMA_ATTENTION, _GATED_MLP),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        AttentionNames(_FUSED_QKV, _FUSED_QKV, _FUSED_QKV, "attention.dense", QkvLayout.FUSED_PER_HEAD),
        MlpCoupling(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        heads_are_free=False,
        renamed=(("lm_head.", "embed_out."),),
    ),
    Family(
        "Phi",
        ("phi",),
        AttentionNames("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        MlpCoupling(("mlp.fc1",), "mlp.fc2"),
        heads_are_free=False,
    ),
)


def find_family(model_type: str) -> Family | None:
    """Returns the family that covers a `config.model_type`, or None; that of the dense model for a compact one."""
    base = model_type.removeprefix(PREFIX)
    return next((family for family in FAMILIES if base in family.model_types), None)


def family_names() -> str:
    """Returns the names of all described families, for messages."""
    return ", ".join(family.name for family in FAMILIES)
