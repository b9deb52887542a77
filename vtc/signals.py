"""What a stage may read beside the features: every signal is declared here, once.

An entry of `SIGNALS` says what the tensor is, where it can be read and what it is made of. By these entries the engine
hooks modules, the plan refuses, the conformance checks draw and the documentation is written. A reader function in the
room of the engine that has the parts computes the tensor. So a new signal is an entry here and a reader there.

This file knows neither torch nor a model.
"""

from dataclasses import dataclass
from typing import Literal

#: query rows that a signal may be asked for: the last row of the prompt, the mean over its text, or over all rows
ROWS = ("last", "text", "mean")

#: what signals are made of
Part = Literal[
    "query",  # projected queries of the attention
    "key",  # projected keys
    "logits",  # products of the two
    "rotation",  # what turns them by their places
    "attention_output",
    "layer_input",
    "mlp_input",
    "embeds",  # what enters the LLM
    "cls",  # the [CLS] token of the tower
    "hidden",  # outputs of the feature layers
    "features",  # what enters the projector
    "tile",  # how an image was cut
    "companion",  # CLIP's joint space, `vtc.ClipCompanion`
]

#: how the conformance checks draw one
Draw = Literal[
    "normal",
    "probability",
    "count",  # 1 to 4
    "place",  # ascending
    "row",  # rows of the sequence
    "valid",  # the first ones of each group are
    "all",
    "none",
    "behind",  # all but the first
    "tile",  # each group is an image of its own
    "prefix",  # no tensor, but the first token of x
]


@dataclass(frozen=True)
class Kind:
    """What one signal is.

    Args:
        shape: its axes, in the letters of the table in docs/paradigm.md: B groups, N tokens as in x, ...
        doc: what it holds.
        sites: where it can be read.
        of: what it is made of.
        carried: whether it comes from the encoder or its companion, and behind the encoder lies where its tokens stand
            in the prompt.
        block: the tower block that makes it, for stages behind the tower: "feature" (the one whose output is the
            feature; `Signal.layer` counts from it), "first" (`Signal.layer` counts from the first block), "every" (all
            up to the feature layer); None: none.
        layer: the decoder layer that makes it: "before" (the one before the site; `Signal.layer` counts from it, and
            what the layer at the site makes is projected from what enters it), "ran" (the same, but only of a layer
            that has run), "own" (always the layer at the site); None: none.
        prefix: whether it has the prefix tokens of x, too.
        rows: whether it can be asked for other query rows than the last, `Signal.rows`.
        comes_with: what a stage gets with it, asked for or not, where the site has that.
        dtype: of its entries; "float" is the dtype of the model, or float32.
        draw: how the conformance checks draw one.
    """

    shape: str
    doc: str
    sites: tuple[str, ...]
    of: tuple[Part, ...] = ()
    carried: bool = False
    block: Literal["feature", "first", "every"] | None = None
    layer: Literal["before", "ran", "own"] | None = None
    prefix: bool = False
    rows: bool = False
    comes_with: tuple[str, ...] = ()
    dtype: Literal["float", "int64", "bool"] = "float"
    draw: Draw = "normal"

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of its axes."""
        return tuple(self.shape.split())

    @property
    def axis(self) -> int:
        """Which axis counts the tokens; -1: none."""
        return self.axes.index("N") if "N" in self.axes else -1


_CLS: tuple[Part, ...] = ("cls", "query", "key", "logits")
_ATTENTION: tuple[Part, ...] = ("query", "key", "rotation", "logits")
_TEXT = ("text_mask", "text_after", "text_position")
_CARRIED = ("llm_in", "layer")

#: signal name -> what it is; batch first and padded like the tokens
SIGNALS = {
    # of the vision tower
    "cls_attention": Kind(
        "B N",
        "probability that [CLS] gives each token at the feature layer, or in the block (tower[i]), mean over heads",
        ("tower", "tower_out", *_CARRIED),
        of=_CLS,
        carried=True,
        block="feature",
        draw="probability",
    ),
    "cls_attention_layers": Kind(
        "B L N",
        "cls_attention of every tower layer, from the first to the feature layer",
        ("tower_out",),
        of=_CLS,
        block="every",
        draw="probability",
    ),
    "cls_hidden": Kind(
        "B 1 D",
        "[CLS] as the first token of x (num_prefix = 1)",
        ("tower_out",),
        of=("cls", "hidden"),
        draw="prefix",
    ),
    "cls_logits": Kind(
        "B N",
        "scaled logit of [CLS] for each token before the softmax, mean over heads",
        ("tower_out",),
        of=_CLS,
        block="feature",
    ),
    "cls_query": Kind(
        "B H d",
        "query of [CLS] at the feature layer, as projected (unscaled)",
        ("tower_out",),
        of=("cls", "query"),
        block="feature",
    ),
    "received_attention": Kind(
        "B N",
        "attention each token receives at the feature layer, or in the block (tower[i]), mean over heads and queries",
        ("tower", "tower_out", *_CARRIED),
        of=("query", "key", "logits"),
        carried=True,
        block="feature",
        draw="probability",
    ),
    "low_keys": Kind(
        "B H N d",
        "keys at tower block `Signal.layer`, counted from the first (0-based)",
        ("tower_out",),
        of=("key",),
        block="first",
    ),
    "sizes": Kind(
        "B N",
        "how many input tokens each token stands for so far",
        ("tower",),
        prefix=True,
        draw="count",
    ),
    # of the pixels and how the host cuts them
    "square_grid": Kind(
        "B",
        "whether the host takes square grids of tokens only",
        ("pixels",),
        dtype="bool",
        draw="none",
    ),
    "tile": Kind(
        "B 4",
        "of a group that is a tile: number of its image in the batch, its number in the image (0: the full image), "
        "(height, width) of the image in tiles; (b, 0, 0, 0) for an image without tiles",
        ("tower_out",),
        of=("tile",),
        dtype="int64",
        draw="tile",
    ),
    # of CLIP's joint space
    "clip_image_embeds": Kind(
        "B N E",
        "patches in CLIP's joint space: visual_projection(post_layernorm(feature layer))",
        _CARRIED,
        of=("features", "companion"),
        carried=True,
    ),
    "clip_text_embeds": Kind(
        "B M E",
        "CLIP text embeddings of the question, one per 77 tokens; zero rows are padding",
        _CARRIED,
        of=("companion",),
        carried=True,
    ),
    # of queries and keys, in the tower and in the LLM
    "keys": Kind(
        "B H N d",
        "keys at the block (tower[i]), at the feature layer (tower_out), or after RoPE at the layer before the site "
        "(LLM)",
        ("tower", "tower_out", "layer"),
        of=("key", "rotation"),
        block="feature",
        layer="before",
        prefix=True,
    ),
    "queries": Kind(
        "B H N d",
        "queries of the visual tokens after RoPE at the layer before the site, or of the block (tower[i]), such that "
        "logits are q.k / sqrt(d)",
        ("tower", "layer"),
        of=("query", "rotation"),
        layer="before",
        prefix=True,
    ),
    # of one decoder layer
    "query_attention": Kind(
        "B N",
        "probability the query rows give each visual token; rows: last token, mean over the text behind the image, or "
        "mean over all",
        ("layer",),
        of=_ATTENTION,
        layer="before",
        rows=True,
        draw="probability",
    ),
    "query_logits": Kind(
        "B N",
        "scaled logit of the query rows for each visual token before the softmax, mean over heads",
        ("layer",),
        of=_ATTENTION,
        layer="before",
        rows=True,
    ),
    "global_attention": Kind(
        "B N",
        "probability the mean query of all tokens up to the last visual one gives each visual token, among those "
        "tokens, at the layer itself, without RoPE, mean over heads",
        ("layer",),
        of=("query", "key", "logits"),
        layer="own",
        draw="probability",
    ),
    "attention_to_text": Kind(
        "B N T",
        "probability each visual row gives each text token, mean over heads",
        ("layer",),
        of=_ATTENTION,
        layer="before",
        comes_with=_TEXT,
        draw="probability",
    ),
    "text_attention": Kind(
        "B T N",
        "probability each text row gives each visual token, mean over heads",
        ("layer",),
        of=_ATTENTION,
        layer="before",
        comes_with=_TEXT,
        draw="probability",
    ),
    "text_attention_heads": Kind(
        "B H T N",
        "text_attention, head by head",
        ("layer",),
        of=_ATTENTION,
        layer="before",
        comes_with=_TEXT,
        draw="probability",
    ),
    "text_gravity": Kind(
        "B T N",
        "mean product of vectors of ones, rotated to the places of a text row and of a visual token: what RoPE alone "
        "makes of their distance, 1 where there is none",
        ("layer",),
        of=("rotation",),
        layer="before",
        comes_with=_TEXT,
    ),
    "text_keys": Kind(
        "B G T d",
        "keys of the text tokens after RoPE at the layer before the site",
        ("layer",),
        of=("key", "rotation"),
        layer="before",
        comes_with=_TEXT,
    ),
    "text_queries": Kind(
        "B H T d",
        "queries of the text tokens after RoPE at the layer before the site",
        ("layer",),
        of=("query", "rotation"),
        layer="before",
        comes_with=_TEXT,
    ),
    "layer_keys": Kind(
        "B G N d",
        "keys of the layer itself (of the hidden states that enter it), after RoPE",
        ("layer",),
        of=("key", "rotation"),
        layer="own",
    ),
    "sequence_keys": Kind(
        "B G S d",
        "keys of all rows after RoPE at the layer before the site",
        ("layer",),
        of=("key", "rotation"),
        layer="before",
    ),
    "sequence_queries": Kind(
        "B H S d",
        "queries of all rows, text and visual, after RoPE at the layer before the site",
        ("layer",),
        of=("query", "rotation"),
        layer="before",
    ),
    "sequence_valid": Kind(
        "B S",
        "which rows of the sequence are no padding",
        ("layer",),
        layer="before",
        dtype="bool",
        draw="all",
    ),
    "sequence_row": Kind(
        "B N",
        "row of each visual token in the sequence",
        ("layer",),
        layer="before",
        dtype="int64",
        draw="row",
    ),
    "attention_output": Kind(
        "B N D",
        "output of the self-attention (after o_proj) at the layer before the site",
        ("layer",),
        of=("attention_output",),
        layer="ran",
    ),
    "layer_input": Kind(
        "B N D",
        "hidden states that entered the layer before the site",
        ("layer",),
        of=("layer_input",),
        layer="ran",
    ),
    "mlp_input": Kind(
        "B N D",
        "normed hidden states that entered the MLP of the layer before the site",
        ("layer",),
        of=("mlp_input",),
        layer="ran",
    ),
    # of what enters the site, and of what entered the LLM
    "position": Kind(
        "B N",
        "place of each visual token in the prompt",
        ("layer",),
        dtype="int64",
        draw="place",
    ),
    "normed_states": Kind("B N D", "hidden states after the LLM's final norm", ("layer",)),
    "visual_embeds": Kind(
        "B V D",
        "embeddings of all visual tokens of the sample that entered the LLM, padded",
        ("layer",),
        of=("embeds",),
        comes_with=("visual_mask",),
    ),
    "visual_mask": Kind(
        "B V",
        "which of visual_embeds are no padding",
        ("layer",),
        of=("embeds",),
        dtype="bool",
        draw="all",
    ),
    "text_states": Kind(
        "B T D",
        "hidden states of the text tokens after the LLM's final norm",
        ("layer",),
        comes_with=_TEXT,
    ),
    "text_embeds": Kind(
        "B T D",
        "embeddings of the sample's text tokens, padded",
        ("llm_in", "layer"),
        of=("embeds",),
        comes_with=_TEXT,
    ),
    "text_mask": Kind(
        "B T",
        "which of the text tokens are no padding",
        ("llm_in", "layer"),
        dtype="bool",
        draw="valid",
    ),
    "text_position": Kind(
        "B T",
        "place of each text token in the prompt",
        ("layer",),
        comes_with=_TEXT,
        dtype="int64",
        draw="place",
    ),
    "text_after": Kind(
        "B T",
        "whether the text token stands after the last visual token of the sample",
        ("llm_in", "layer"),
        comes_with=_TEXT,
        dtype="bool",
        draw="behind",
    ),
}


def signals_at(site: str) -> tuple[str, ...]:
    """The signals that can be read at a site, as "layer"."""
    return tuple(name for name, kind in SIGNALS.items() if site in kind.sites)


def read_at(site: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The signals that a stage at `site` gets for those that it declares: these, and what comes with them."""
    found = dict.fromkeys(names)
    for name in names:
        found.update(dict.fromkeys(other for other in SIGNALS[name].comes_with if site in SIGNALS[other].sites))
    return tuple(found)
