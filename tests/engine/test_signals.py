"""Every signal that the engine captures, against the attentions and states of the stock eager model itself."""

import functools
import inspect

import pytest
import torch

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.primitives import topk_keep
from vtc.stages import Method, Signal, Site, Stage
from vtc.testing import families, tiny, visible_columns
from vtc.testing.oracle import masked_logits
from vtc.testing.tiny import PROMPTS

BATCHES = {"one": PROMPTS[:1], "three": PROMPTS}
LAYER = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def built(family):
    return tiny(family, "eager")


class Probe(Method):
    """Keeps half of the tokens, and remembers what it was given."""

    slug = "probe"
    positions = "original"

    def __init__(self, site, *signals, pool="sample", budget=0.5):
        object.__setattr__(self, "budget", vtc.Budget.of(budget))
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "wanted", tuple(signals))
        object.__setattr__(self, "pool", pool)
        object.__setattr__(self, "seen", [])

    def stages(self):
        return (Stage(self.site, self.filter, signals=self.wanted, pool=self.pool),)

    def filter(self, tokens):
        self.seen.append(tokens)
        return topk_keep(tokens.x[..., 0], tokens.budget, mask=tokens.mask)

    @property
    def tokens(self):
        (tokens,) = self.seen
        return tokens


def run(one, methods, inputs, **options):
    with vtc.compress(one.model, methods, positions="original", **options), torch.no_grad():
        return one.model(**inputs, use_cache=True)


class Host:
    """What the stock model does in its decoder layers."""

    def __init__(self, one, inputs, visible=None):
        self.one, self.adapter = one, adapter_for(one.model)
        self.inputs, self.weights, self.states, self.outputs, self.mlp = inputs, {}, {}, {}, {}
        hooks = []
        for i, layer in enumerate(self.adapter.layers):
            hooks += [
                layer.self_attn.register_forward_hook(functools.partial(self._attention, i)),
                layer.register_forward_pre_hook(functools.partial(self._keep, self.states, i)),
                layer.mlp.register_forward_pre_hook(functools.partial(self._keep, self.mlp, i)),
            ]
        hooks.append(self.adapter.language_model.register_forward_pre_hook(self._enter, with_kwargs=True))
        if visible is None:
            with torch.no_grad():
                one.model(**inputs, use_cache=False)
        else:
            masked_logits(one.model, inputs, visible)
        for hook in hooks:
            hook.remove()
        ids, encoders = inputs["input_ids"], self.adapter.encoders
        self.is_visual = torch.stack([ids == encoder.placeholder_id for encoder in encoders]).any(0)
        self.is_text = ~self.is_visual & inputs["attention_mask"].bool()
        self.samples = [b for b in range(len(ids)) if self.is_visual[b].any()]

    def _attention(self, layer, module, args, output):
        self.outputs[layer], self.weights[layer] = output

    def _keep(self, where, layer, module, args):
        where[layer] = args[0]

    def _enter(self, module, args, kwargs):
        self.embeds = kwargs["inputs_embeds"]

    def visual(self, b):
        return self.is_visual[b].nonzero()[:, 0]

    def text(self, b):
        return self.is_text[b].nonzero()[:, 0]

    def behind(self, b):
        text = self.text(b)
        after = text[text > self.visual(b).max()]
        return after if len(after) else text

    def plain(self, layer):
        """Queries and keys before RoPE, written out: norm, projection, heads, norm of each head."""
        attention = self.adapter.layers[layer].self_attn
        x = self.adapter.layers[layer].input_layernorm(self.states[layer])
        parts = []
        for name in ("q", "k"):
            linear = getattr(attention, f"{name}_proj")
            heads = torch.nn.functional.linear(x, linear.weight, linear.bias)
            heads = heads.reshape(*x.shape[:2], -1, attention.head_dim)
            norm = getattr(attention, f"{name}_norm", None)
            parts.append((heads if norm is None else norm(heads)).transpose(1, 2))
        return parts


def check(tokens, name, samples, expected):
    """`expected(b)` is the signal of sample b."""
    value = tokens.signal(name)
    for g, b in enumerate(samples):
        want = expected(b)
        got = value[g]
        for axis, n in enumerate(want.shape):
            got = got.narrow(axis, 0, n)
        torch.testing.assert_close(got.to(want.dtype), want, **CLOSE)


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("off", [0, 1, -1], ids=["before", "own", "two-before"])
@pytest.mark.parametrize("family", families())
def test_attention_of_decoder_layers(family, off, prompts):
    """Of the layer before the site, of the layer at the site (which has not run), and of an earlier one."""
    one = built(family)
    inputs = one.inputs(prompts)
    names = [("text_attention", "last"), ("attention_to_text", "last"), ("query_attention", "last")]
    probes = [Probe(Site("layer", LAYER), *(Signal(name, off, rows) for name, rows in names))]
    probes.append(Probe(Site("layer", LAYER), Signal("query_attention", off, "text")))
    host = Host(one, inputs)
    for probe in probes:
        run(one, [probe], inputs)
    weights = host.weights[LAYER - 1 + off].mean(dim=1)
    tokens = probes[0].tokens
    check(tokens, "text_attention", host.samples, lambda b: weights[b, host.text(b)][:, host.visual(b)])
    check(tokens, "attention_to_text", host.samples, lambda b: weights[b, host.visual(b)][:, host.text(b)])
    last = inputs["input_ids"].shape[1] - 1  # padded on the left
    check(tokens, "query_attention", host.samples, lambda b: weights[b, last, host.visual(b)])
    check(
        probes[1].tokens,
        "query_attention",
        host.samples,
        lambda b: weights[b, host.behind(b)].mean(0)[host.visual(b)],
    )
    for g, b in enumerate(host.samples):
        mask = tokens.signal("text_mask")[g]
        assert tokens.signal("text_position")[g][mask].tolist() == host.text(b).tolist()
        assert tokens.signal("text_after")[g][mask].tolist() == (host.text(b) > host.visual(b).max()).tolist()


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", families())
def test_states_and_heads_of_decoder_layers(family, prompts):
    one = built(family)
    inputs = one.inputs(prompts)
    names = ("attention_output", "layer_input", "mlp_input", "global_attention", "layer_keys", "visual_embeds")
    names += ("text_embeds", "queries", "keys", "text_queries", "text_keys", "query_logits")
    names += ("sequence_queries", "sequence_keys", "sequence_valid", "sequence_row")
    probe = Probe(Site("layer", LAYER), *(Signal(name) for name in names))
    host = Host(one, inputs)
    run(one, [probe], inputs)
    tokens, source = probe.tokens, LAYER - 1
    visual, text = host.visual, host.text
    projected = {}
    adapter = host.adapter
    attention = adapter.layers[source].self_attn
    hook = attention.o_proj.register_forward_hook(lambda m, a, out: projected.update(out=out))
    with torch.no_grad():
        one.model(**inputs, use_cache=False)
    hook.remove()
    check(tokens, "attention_output", host.samples, lambda b: projected["out"][b, visual(b)])
    check(tokens, "layer_input", host.samples, lambda b: host.states[source][b, visual(b)])
    check(tokens, "mlp_input", host.samples, lambda b: host.mlp[source][b, visual(b)])
    check(tokens, "visual_embeds", host.samples, lambda b: host.embeds[b, visual(b)])
    check(tokens, "text_embeds", host.samples, lambda b: host.embeds[b, text(b)])
    assert tokens.signal("visual_mask").sum(1).tolist() == [len(visual(b)) for b in host.samples]

    # queries and keys give the attention of the host, whatever the rotation
    heads = host.weights[source].shape[1]
    repeat = heads // tokens.signal("keys").shape[1]
    scale = adapter.layer_attention(source).scale
    for g, b in enumerate(host.samples):
        row = tokens.signal("sequence_row")[g, : len(visual(b))]
        assert row.tolist() == visual(b).tolist()
        assert torch.equal(tokens.signal("sequence_valid")[g], inputs["attention_mask"][b].bool())
        keys = tokens.signal("sequence_keys")[g].repeat_interleave(repeat, dim=0)
        queries = tokens.signal("sequence_queries")[g]
        logits = queries @ keys.transpose(1, 2) * scale
        weights = host.weights[source][b]
        hidden = weights == 0
        if getattr(adapter.text_config, "attn_logit_softcapping", None) is None:
            given = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            valid = inputs["attention_mask"][b].bool()
            torch.testing.assert_close(given[:, valid], weights[:, valid], **CLOSE)
        n, t = len(visual(b)), len(text(b))
        torch.testing.assert_close(tokens.signal("keys")[g, :, :n], tokens.signal("sequence_keys")[g][:, visual(b)])
        torch.testing.assert_close(tokens.signal("queries")[g, :, :n], queries[:, visual(b)])
        torch.testing.assert_close(tokens.signal("text_queries")[g, :, :t], queries[:, text(b)])
        torch.testing.assert_close(tokens.signal("text_keys")[g, :, :t], tokens.signal("sequence_keys")[g][:, text(b)])
        torch.testing.assert_close(tokens.signal("query_logits")[g, :n], logits[:, -1].mean(0)[visual(b)], **CLOSE)

    # the layer at the site, from the states that enter it
    queries, keys = host.plain(LAYER)
    scale = adapter.layer_attention(LAYER).scale

    def share(b):
        first = int(inputs["attention_mask"][b].argmax())
        inside = slice(first, int(visual(b).max()) + 1)
        mean = queries[b, :, inside].mean(1, keepdim=True)
        every = keys[b, :, inside].repeat_interleave(repeat, dim=0)
        given = (mean @ every.transpose(1, 2) * scale).softmax(-1).mean(0)[0]
        return given[visual(b) - first]

    check(tokens, "global_attention", host.samples, share)
    # rotation keeps lengths, and angles between keys at one place; their attention is tested above
    check(tokens, "layer_keys", host.samples, lambda b: rotated(one, inputs, LAYER, keys)[b][:, visual(b)])


def rotated(one, inputs, layer, keys):
    """Keys as the host's own function rotates them."""
    adapter, found = adapter_for(one.model), {}

    def enter(module, args, kwargs):
        found.update(kwargs)

    hook = adapter.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad():
        one.model(**inputs, use_cache=False)
    hook.remove()
    apply = inspect.getmodule(type(adapter.layers[layer])).apply_rotary_pos_emb
    return apply(keys, keys, *found["position_embeddings"])[1]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("off", [0, 1])
def test_attention_after_an_earlier_cut(family, off):
    """Against the masked full model: what was dropped has no attention, and the others keep their rows."""
    one = built(family)
    inputs = one.inputs(PROMPTS)
    first = Probe(Site("layer", 1), budget=0.6)
    probe = Probe(Site("layer", LAYER), Signal("text_attention", off), Signal("position"), Signal("keys", off))
    out = run(one, [first, probe], inputs)
    visible = visible_columns(names.cache_of(out), inputs["input_ids"].shape[1])
    kept = [visible(layer) for layer in (0, 1, 1, 1)]
    host = Host(one, inputs, lambda layer: kept[layer])
    weights = host.weights[LAYER - 1 + off].mean(dim=1)
    tokens = probe.tokens
    assert sum(tokens.lengths) < sum(len(host.visual(b)) for b in host.samples)
    for g, b in enumerate(host.samples):
        n, t = tokens.lengths[g], len(host.text(b))
        place = tokens.signal("position")[g, :n]
        torch.testing.assert_close(
            tokens.signal("text_attention")[g, :t, :n], weights[b, host.text(b)][:, place], **CLOSE
        )


@pytest.mark.parametrize("off", [0, 1, -1])
def test_two_stages_at_one_layer(off):
    """The second reads of layers that have run what they gave, and of the layer itself what it would now see."""
    one = built("llava")
    inputs = one.inputs(PROMPTS)
    probes = [
        Probe(Site("layer", 2), Signal("text_attention", off), Signal("position"), budget=share)
        for share in (0.5, 0.25)
    ]
    run(one, probes, inputs)
    before, after = (probe.tokens for probe in probes)
    host = Host(one, inputs)
    assert all(a < b for a, b in zip(after.lengths, before.lengths, strict=True))
    if off == 1:
        left = ~host.is_visual
        for g, b in enumerate(host.samples):
            left[b, after.signal("position")[g, : after.lengths[g]]] = True
        host = Host(one, inputs, lambda layer: left if layer == 2 else torch.ones_like(left))
    weights = host.weights[1 + off].mean(dim=1)
    for g, b in enumerate(host.samples):
        n, t = after.lengths[g], len(host.text(b))
        expected = weights[b, host.text(b)][:, after.signal("position")[g, :n]]
        torch.testing.assert_close(after.signal("text_attention")[g, :t, :n], expected, **CLOSE)


@pytest.mark.parametrize("off", [0, 1])
def test_attention_of_a_second_turn(off):
    """An image behind a cached text: its keys are among those that are seen."""
    one = built("llava")
    whole = one.inputs([(9, "image", 4)])
    cut = 6
    text = {"input_ids": whole["input_ids"][:, :cut], "attention_mask": whole["attention_mask"][:, :cut]}
    probe = Probe(Site("layer", 2), Signal("text_attention", off), Signal("query_attention", off))
    with vtc.compress(one.model, [probe], positions="original"), torch.no_grad():
        cache = names.cache_of(one.model(**text, use_cache=True))
        rest = {**whole, "input_ids": whole["input_ids"][:, cut:]}
        one.model(**rest, **names.cache_argument(one.model, cache), use_cache=True)
    host = Host(one, whole)
    weights = host.weights[1 + off].mean(dim=1)[0]
    text_rows = host.text(0)[host.text(0) >= cut]
    tokens = probe.tokens
    torch.testing.assert_close(
        tokens.signal("text_attention")[0, : len(text_rows)], weights[text_rows][:, host.visual(0)], **CLOSE
    )
    torch.testing.assert_close(tokens.signal("query_attention")[0], weights[-1, host.visual(0)], **CLOSE)


def test_right_padding_has_its_own_last_row():
    one = built("llava")
    inputs = one.inputs(PROMPTS, padding="right")
    probe = Probe(Site("layer", 2), Signal("query_attention"), Signal("query_logits"))
    run(one, [probe], inputs)
    host = Host(one, inputs)
    weights = host.weights[1].mean(dim=1)
    last = inputs["attention_mask"].sum(1) - 1
    check(probe.tokens, "query_attention", host.samples, lambda b: weights[b, last[b], host.visual(b)])


# The vision tower


class Tower:
    """What the stock tower does in its blocks, for separate q, k projections."""

    def __init__(self, one, inputs):
        (self.encoder, *_) = adapter_for(one.model).encoders
        self.weights, self.entering = {}, {}
        hooks = []
        for i, block in enumerate(self.encoder.blocks):
            attention = getattr(block, "self_attn", None) or block.attention
            hooks.append(attention.register_forward_hook(functools.partial(self._attention, i)))
            hooks.append(attention.register_forward_pre_hook(functools.partial(self._enter, i), with_kwargs=True))
        with torch.no_grad():
            one.model(**inputs)
        for hook in hooks:
            hook.remove()

    def _attention(self, block, module, args, output):
        self.weights[block] = output[1]

    def _enter(self, block, module, args, kwargs):
        self.entering[block] = module, args[0] if args else kwargs["hidden_states"]

    def heads(self, block, name):
        module, x = self.entering[block]
        parts = getattr(module, f"{name}_proj")(x)
        norm = getattr(module, f"{name}_norm", None)
        if norm is not None:
            parts = norm(parts)
        return parts.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    @property
    def depth(self):
        return next(i for i, block in enumerate(self.encoder.blocks) if block is self.encoder.feature_layers[-1])


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("family", ["llava", "video_llava"])
def test_signals_of_cls_towers(family, off, prompts):
    """LLaVA takes its features one block before the last, and the stock model runs that last block as well."""
    one = built(family)
    inputs = one.inputs(prompts)
    names = ("cls_attention", "cls_logits", "cls_query", "received_attention", "keys")
    probe = Probe(Site("tower_out"), *(Signal(name, off) for name in names), pool="image")
    layers = Probe(
        Site("tower_out"), Signal("cls_attention_layers"), Signal("low_keys", 1), Signal("tile"), pool="image"
    )
    for method in (probe, layers):
        run(one, [method], inputs)
    tower = Tower(one, inputs)
    block = tower.depth + off
    assert block < len(tower.encoder.blocks)
    seen, weights = probe.tokens.signals, tower.weights[block]
    queries, keys = tower.heads(block, "q"), tower.heads(block, "k")
    torch.testing.assert_close(seen["cls_attention"], weights[:, :, 0, 1:].mean(1), **CLOSE)
    torch.testing.assert_close(seen["received_attention"], weights.mean((1, 2))[:, 1:], **CLOSE)
    torch.testing.assert_close(seen["cls_query"], queries[:, :, 0], **CLOSE)
    torch.testing.assert_close(seen["keys"], keys[:, :, 1:], **CLOSE)
    logits = queries[:, :, :1] @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    torch.testing.assert_close(seen["cls_logits"], logits[:, :, 0, 1:].mean(1), **CLOSE)
    every = torch.stack([tower.weights[i][:, :, 0, 1:].mean(1) for i in range(tower.depth + 1)], dim=1)
    torch.testing.assert_close(layers.tokens.signal("cls_attention_layers"), every, **CLOSE)
    torch.testing.assert_close(layers.tokens.signal("low_keys"), tower.heads(1, "k")[:, :, 1:], **CLOSE)
    images = len(every)
    assert layers.tokens.signal("tile").tolist() == [[i, 0, 0, 0] for i in range(images)]


def test_signals_of_pooled_cls_towers():
    """InternVL: the mean over the 2 x 2 patches of a token; its features leave the last block."""
    one = built("internvl")
    inputs = one.inputs(PROMPTS)
    probe = Probe(
        Site("tower_out"), Signal("cls_attention_layers"), Signal("low_keys"), Signal("cls_logits"), pool="image"
    )
    run(one, [probe], inputs)
    tower = Tower(one, inputs)

    def pooled(patches):
        return torch.nn.functional.avg_pool2d(patches.unflatten(-1, (8, 8)), 2).flatten(-2)

    every = torch.stack([tower.weights[i][:, :, 0, 1:].mean(1) for i in range(tower.depth + 1)], dim=1)
    torch.testing.assert_close(probe.tokens.signal("cls_attention_layers"), pooled(every), **CLOSE)
    keys = tower.heads(0, "k")[:, :, 1:].transpose(2, 3).flatten(1, 2)
    expected = pooled(keys).unflatten(1, (4, -1)).transpose(2, 3)
    torch.testing.assert_close(probe.tokens.signal("low_keys"), expected, **CLOSE)
    with pytest.raises(errors.SignalUnavailableError, match="use layer=0"):
        vtc.patch(one.model, Probe(Site("tower_out"), Signal("cls_attention", 1), pool="image"))


def test_tiles_of_an_image():
    """Image, number in the image, and rows and columns of tiles; padding that the host cuts off is in no group."""
    one = built("llava_next")
    inputs = one.inputs(PROMPTS)  # images of 1 x 2, 2 x 2 and 2 x 1 tiles
    probe = Probe(Site("tower_out"), Signal("tile"), Signal("cls_attention", 1), pool="image")
    run(one, [probe], inputs)
    grids = [(1, 2), (2, 2), (2, 1)]
    expected = [[i, n, h, w] for i, (h, w) in enumerate(grids) for n in range(h * w + 1)]
    assert probe.tokens.signal("tile").tolist() == expected
    tower = Tower(one, inputs)
    weights = tower.weights[tower.depth + 1][:, :, 0, 1:].mean(1)
    # full tiles: those of the first image
    torch.testing.assert_close(probe.tokens.signal("cls_attention")[:3, :16], weights[:3], **CLOSE)


# Signals of the encoder, carried to the prompt


@pytest.mark.parametrize("site", [Site("llm_in"), Site("layer", 2)], ids=str)
@pytest.mark.parametrize("pool", ["image", "sample"])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
def test_cls_attention_is_carried_to_the_prompt(site, pool, prompts):
    one = built("llava")
    inputs = one.inputs(prompts)
    probe = Probe(site, Signal("cls_attention", 1), pool=pool)
    run(one, [probe], inputs)
    tower = Tower(one, inputs)
    weights = tower.weights[tower.depth + 1][:, :, 0, 1:].mean(1)
    kinds = [[piece for piece in prompt if piece == "image"] for prompt in prompts]
    found, image = [], 0
    for kind in kinds:
        own = [weights[image + i] for i in range(len(kind))]
        image += len(kind)
        found += own if pool == "image" else [torch.cat(own)] if own else []
    tokens = probe.tokens
    assert tokens.lengths == tuple(len(row) for row in found)
    for row, value in zip(found, tokens.signal("cls_attention"), strict=True):
        torch.testing.assert_close(value[: len(row)], row, **CLOSE)


def test_carried_signals_follow_packing_and_earlier_cuts():
    one = built("llava_next")
    inputs = one.inputs(PROMPTS)
    whole = Probe(Site("llm_in"), Signal("cls_attention"), pool="image")
    run(one, [whole], inputs)
    adapter = adapter_for(one.model)
    (encoder,) = adapter.encoders
    packing = adapter.packing(encoder, inputs)
    tower = Tower(one, inputs)
    weights = tower.weights[tower.depth][:, :, 0, 1:].mean(1)
    for image, length in enumerate(packing.lengths):
        expected = torch.zeros(length)
        for tile in [g for g, i in enumerate(packing.image) if i == image]:
            there = packing.slot[tile] >= 0
            expected[packing.slot[tile][there]] = weights[tile][there]
        torch.testing.assert_close(whole.tokens.signal("cls_attention")[image, :length], expected, **CLOSE)
    first = Probe(Site("tower_out"), pool="image")
    after = Probe(Site("llm_in"), Signal("cls_attention"), pool="image")
    with vtc.compress(one.model, [first, after], positions="original") as handle, torch.no_grad():
        features = one.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        anchors = features._vtc.token_map.anchor
        one.model(**inputs)
        assert handle.report.spec
    carried = whole.tokens.signal("cls_attention")
    for image, n in enumerate(after.tokens.lengths):
        expected = carried[image, anchors[image, :n]]
        torch.testing.assert_close(after.tokens.signal("cls_attention")[image, :n], expected, **CLOSE)


def test_beams_carry_the_signals_of_their_prompt():
    one = built("llava")
    inputs = one.inputs(PROMPTS[:2])
    probe = Probe(Site("llm_in"), Signal("cls_attention"), pool="image")
    with vtc.compress(one.model, [probe], positions="original"):
        one.model.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
    tower = Tower(one, inputs)
    weights = tower.weights[tower.depth][:, :, 0, 1:].mean(1)
    order = [0] * 3 + [1, 2] * 3
    torch.testing.assert_close(probe.seen[0].signal("cls_attention"), weights[order], **CLOSE)


# Refusals


@pytest.mark.parametrize(
    ("site", "signal", "message"),
    [
        (Site("layer", 2), Signal("attention_output", 1), "Use layer=0 or less"),
        (Site("layer", 2), Signal("keys", 2), "Use layer=1 or less"),
        (Site("layer", 0), Signal("keys"), "layers 1..3"),
        (Site("layer", 2), Signal("query_attention", rows="first"), "rows='first'"),
        (Site("tower_out"), Signal("low_keys", 3), "blocks 0..2"),
        (Site("tower_out"), Signal("cls_attention", 2), "use layer=0"),
        (Site("llm_in"), Signal("clip_text_embeds"), "companion=vtc.ClipCompanion"),
        (Site("llm_in"), Signal("keys"), "does not capture"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(site, signal, message):
    with pytest.raises(errors.VTCError, match=message):
        vtc.patch(built("llava").model, Probe(site, signal, pool="image"))


def test_a_tower_that_stops_early_is_refused():
    """Should a host not run the block behind the feature layer, nothing is made up."""
    one = tiny("llava", "eager")
    probe = Probe(Site("tower_out"), Signal("cls_attention", 1), pool="image")
    with vtc.compress(one.model, [probe], positions="original"), torch.no_grad():
        attention = one.model.model.vision_tower.encoder.layers[-1].self_attn
        stock = attention.q_proj.forward
        hooks, attention.q_proj._forward_hooks = (
            attention.q_proj._forward_hooks,
            type(attention.q_proj._forward_hooks)(),
        )
        with pytest.raises(errors.UnsupportedFeatureError, match="did not run its block 2"):
            one.model(**one.inputs())
        attention.q_proj._forward_hooks = hooks
        assert attention.q_proj.forward == stock
