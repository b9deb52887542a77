"""Encoders by themselves: ToMe equals a slow one written from the paper, and what is around the blocks stays stock."""

import dataclasses
import functools
import gc
import importlib
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc.encoders import encoder_for, methods_by_themselves
from vtc.testing import relative_difference, tiny
from vtc.testing.golden import golden_cases

TOLERANCE = 1e-5
SIZES = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, image_size=32, patch_size=4)
TOWERS = golden_cases("tome", Path(__file__).parents[1] / "golden", kind="vit")


def transformers_model(name, config, attention, **more):
    config = getattr(transformers, config)(**{**SIZES, **more})
    config._attn_implementation = attention
    return getattr(transformers, name)(config)


def two_towers(name, attention):
    family = name.removesuffix("Model")
    vision = {**SIZES, "intermediate_size": 64}
    text = dict(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        vocab_size=50,
        projection_size=32,
    )
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    config._attn_implementation = attention
    return getattr(transformers, name)(config)


def timm_model(attention, name="vit_tiny_patch16_224", **more):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, num_classes=7)
    model = timm.create_model(name, pretrained=False, **{**sizes, **more})
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return model


def open_clip_model(attention, **more):
    library = pytest.importorskip("open_clip.transformer")
    model = library.VisionTransformer(32, 4, 32, 3, 2, 2.0, output_dim=16, ls_init_value=0.3, **more)
    if attention == "eager":
        pytest.skip("open_clip has one implementation")
    return model


BUILD = {
    "CLIPModel": lambda attention: two_towers("CLIPModel", attention),
    "CLIPVisionModel": lambda a: transformers_model("CLIPVisionModel", "CLIPVisionConfig", a, intermediate_size=64),
    "CLIPVisionModelWithProjection": lambda a: transformers_model(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", a, intermediate_size=64, projection_dim=16
    ),
    "SiglipModel": lambda attention: two_towers("SiglipModel", attention),
    "SiglipVisionModel": lambda a: transformers_model(
        "SiglipVisionModel", "SiglipVisionConfig", a, intermediate_size=64
    ),
    "Dinov2Model": lambda a: transformers_model("Dinov2Model", "Dinov2Config", a, mlp_ratio=2, layerscale_value=0.5),
    "Dinov2ForImageClassification": lambda a: transformers_model(
        "Dinov2ForImageClassification", "Dinov2Config", a, mlp_ratio=2, use_swiglu_ffn=True
    ),
    "Dinov2WithRegistersModel": lambda a: transformers_model(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", a, mlp_ratio=2, num_register_tokens=3
    ),
    "ViTForImageClassification": lambda a: transformers_model(
        "ViTForImageClassification", "ViTConfig", a, intermediate_size=64
    ),
    "DeiTModel": lambda a: transformers_model("DeiTModel", "DeiTConfig", a, intermediate_size=64),
    "timm": timm_model,
    "timm-norms": lambda attention: timm_model(attention, qk_norm=True, init_values=0.3, reg_tokens=2),
    "timm-map": lambda attention: timm_model(
        attention, "vit_base_patch16_siglip_224", class_token=False, global_pool="map"
    ),
    "open_clip": open_clip_model,
    "open_clip-custom": lambda attention: open_clip_model(
        attention, block_type="custom", qk_norm=True, scale_attn_inner=True
    ),
}


def build(name, attention="sdpa"):
    torch.manual_seed(7)
    model = BUILD[name](attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, class and register tokens of a fresh model are 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(11))


def run(model, pixels):
    """Every tensor of the output of one call, by name."""
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            ids = torch.tensor([[1, 5, 9, 49]])
            output = model(input_ids=ids, pixel_values=pixels)
            return {"logits": output.logits_per_image, "states": output.vision_model_output.last_hidden_state}
        output = model(pixels)
    if isinstance(output, torch.Tensor):
        return {"output": output}
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor)}


def projections(block, x):
    """Queries, keys and values [H, L, d] of one sequence [L, D], from the weights."""
    attention = next(getattr(block, name) for name in ("attn", "self_attn", "attention") if hasattr(block, name))
    if hasattr(attention, "in_proj_weight"):
        parts = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
    elif hasattr(attention, "qkv"):
        parts = attention.qkv(x).chunk(3, dim=-1)
    else:
        parts = [getattr(attention, f"{letter}_proj")(x) for letter in "qkv"]
    q, k, v = (part.unflatten(-1, (2, 16)).transpose(0, 1) for part in parts)
    for first, second in (("q_norm", "k_norm"), ("ln_q", "ln_k")):
        if hasattr(attention, first):
            q, k = getattr(attention, first)(q), getattr(attention, second)(k)
    return attention, q, k, v


def slow_block(block, x, sizes, merge):
    """A pre-norm block on one sequence: the attention with log(size), `merge(x, keys)` between, and the MLP."""

    def part(*names):
        return next((getattr(block, name) for name in names if hasattr(block, name)), nn.Identity())

    attention, q, k, v = projections(block, part("layer_norm1", "layernorm_before", "norm1", "ln_1")(x))
    logits = q @ k.transpose(1, 2) / 4.0 + torch.tensor(sizes).log()
    mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    mixed = getattr(attention, "ln_inner", nn.Identity())(mixed)
    out = next(getattr(attention, n) for n in ("out_proj", "o_proj", "proj") if hasattr(attention, n))
    x = x + part("layer_scale1", "ls1", "ls_1")(out(mixed))
    x = merge(x, k.mean(0))
    return x + part("layer_scale2", "ls2", "ls_2")(
        block.mlp(part("layer_norm2", "layernorm_after", "norm2", "ln_2")(x))
    )


def slow_tome(blocks, x, prefix, r):
    """ToMe (arXiv 2210.09461) on one sequence, pair by pair: the features of each input row behind the last block."""
    groups = [[i] for i in range(len(x))]
    counts = []

    def merge(x, keys):
        nonlocal groups
        keys = keys / keys.norm(dim=1, keepdim=True)
        first = [i for i in range(0, len(x), 2) if i >= prefix]
        second = [i for i in range(1, len(x), 2) if i >= prefix]
        pairs = []
        for i in first:
            best = max(second, key=lambda j: float(keys[i] @ keys[j]))
            pairs.append((float(keys[i] @ keys[best]), i, best))
        pairs = sorted(pairs, reverse=True)[: min(r, (len(x) - prefix) // 2)]
        into = {i: j for _, i, j in pairs}
        rows, found = [], []
        order = [i for i in range(0, len(x), 2) if i not in into]
        if not prefix:  # the published order without [CLS]: by falling similarity
            place = {i: max(float(keys[i] @ keys[j]) for j in second) for i in order}
            order = sorted(order, key=lambda i: -place[i])
        front = list(range(prefix))
        for i in [*front, *(i for i in order if i >= prefix), *second]:
            members = [i, *(a for a, b in into.items() if b == i)]
            weights = torch.tensor([float(len(groups[m])) for m in members])
            rows.append((weights[:, None] * x[members]).sum(0) / weights.sum())
            found.append([token for m in members for token in groups[m]])
        groups = found
        counts.append(len(groups) - prefix)
        return torch.stack(rows)

    for block in blocks:
        x = slow_block(block, x, [float(len(group)) for group in groups], merge)
    whole = torch.empty(sum(map(len, groups)), x.shape[1])
    for row, group in zip(x, groups, strict=True):
        whole[group] = row
    return whole, groups, counts


def watched(model, pixels, spec, budget=None):
    """One run under a patch: outputs, report, what entered the first block and left the last one."""
    encoder = encoder_for(model)
    seen = {}
    hooks = [
        encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(entered=args[0].clone())),
        encoder.blocks[-1].register_forward_hook(lambda module, args, output: seen.update(left=output)),
    ]
    with vtc.compress_encoder(model, spec, budget) as handle:
        outputs = run(model, pixels)
        report = handle.report
    for hook in hooks:
        hook.remove()
    return outputs, report, seen


def finish(model, states, pixels):
    """The stock model whose last block gives `states`."""
    hook = encoder_for(model).blocks[-1].register_forward_hook(lambda module, args, output: states)
    outputs = run(model, pixels)
    hook.remove()
    return outputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BUILD)
def test_tome_equals_a_slow_one(name, attention):
    model, pixels = build(name, attention), images()
    encoder = encoder_for(model)
    outputs, report, seen = watched(model, pixels, "tome(r=8)")
    assert report.per_block == ((56,) * 3, (48,) * 3, (40,) * 3)
    whole = []
    for image, x in enumerate(seen["entered"]):
        with torch.no_grad():
            slow, groups, counts = slow_tome(encoder.blocks, x, encoder.num_prefix, 8)
        assert counts == [56, 48, 40]
        assert relative_difference(seen["left"][image], slow) < TOLERANCE
        patches = sorted(len(group) for group in groups[encoder.num_prefix :])
        assert sorted(report.sizes[image].tolist()) == patches
        whole.append(slow)
    expected = finish(model, torch.stack(whole), pixels)
    assert outputs.keys() == expected.keys()
    for key, value in outputs.items():
        assert relative_difference(value, expected[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", ["CLIPVisionModel", "Dinov2Model", "ViTForImageClassification", "timm", "open_clip"])
@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_golden_blocks(case, name):
    """The weights and tokens of the authors' recorded timm blocks, in a model of each library."""
    model = build(name)
    encoder = encoder_for(model)
    for i, block in enumerate(encoder.blocks):
        names = [name for name in case.arrays if name.startswith(f"w_blocks.{i}.")]
        load(block, {name.removeprefix(f"w_blocks.{i}."): case[name] for name in names})
        for module in block.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = case.number("eps")
    x, (r, inflection) = case["x_in"], case["r_arg"].tolist()
    hook = encoder.blocks[0].register_forward_pre_hook(lambda module, args: (x, *args[1:]))
    _, report, seen = watched(model, images(len(x)), vtc.create("tome", r=int(r), inflection=inflection))
    hook.remove()
    last = len(encoder.blocks) - 1
    member = case[f"block{last}_source"].long().argmax(dim=1)
    wanted = case[f"block{last}_out"].gather(1, member[..., None].expand_as(x))
    torch.testing.assert_close(seen["left"], wanted, atol=2e-5, rtol=1e-4)
    assert report.per_block == tuple((case[f"block{i}_out"].shape[1] - 1,) * len(x) for i in range(last + 1))


def load(block, weights):
    """Put the weights of a timm block into a block of any library."""
    modules = {
        "norm1": ("layer_norm1", "layernorm_before", "norm1", "ln_1"),
        "norm2": ("layer_norm2", "layernorm_after", "norm2", "ln_2"),
        "attn.proj": ("self_attn.out_proj", "attention.o_proj", "attn.out_proj", "attn.proj"),
        "mlp.fc1": ("mlp.fc1", "mlp.c_fc"),
        "mlp.fc2": ("mlp.fc2", "mlp.c_proj"),
    }
    own = dict(block.named_parameters())
    taken = set()

    def put(names, value):
        name = next(name for name in names if name in own)
        with torch.no_grad():
            own[name].copy_(value)
        taken.add(name)

    for full, value in weights.items():
        part, kind = full.rsplit(".", 1)
        if part != "attn.qkv":
            put([f"{name}.{kind}" for name in modules[part]], value)
        elif any("qkv" in name or "in_proj" in name for name in own):
            put([f"attn.qkv.{kind}", f"attn.in_proj_{kind}"], value)
        else:
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                put([f"{owner}.{letter}_proj.{kind}" for owner in ("self_attn", "attention")], piece)
    with torch.no_grad():
        for name in own.keys() - taken:  # the recorded blocks have no layer scale
            assert "scale" in name or "ls" in name or "lambda" in name, name
            own[name].fill_(1.0)
    if hasattr(block.mlp, "activation_fn"):
        block.mlp.activation_fn = nn.GELU()


@pytest.mark.parametrize("name", BUILD)
def test_keeping_all_changes_no_bit_and_removal_restores(name):
    model, pixels = build(name), images()
    before = run(model, pixels)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    handle = vtc.patch_encoder(model, "tome", budget=1.0)
    same = run(model, pixels)
    assert handle.report.tokens == (64,) * 3
    assert handle.report.flops == handle.report.flops_dense
    handle.remove()
    handle.remove()
    assert not handle.active
    with vtc.compress_encoder(model, "tome", 0.5) as other:
        changed = run(model, pixels)
        assert other.report.tokens == (32,) * 3
    after = run(model, pixels)
    for key, value in before.items():
        assert torch.equal(same[key], value), key
        assert torch.equal(after[key], value), key
        assert changed[key].shape == value.shape, key
    assert any(not torch.equal(changed[key], value) for key, value in before.items())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == hooks


@dataclasses.dataclass(frozen=True)
class KeepsAll(vtc.Method):
    """Runs the two halves of each block one after the other, and changes nothing between them."""

    slug = "keeps-all"
    steps = ("all", "none", "none")
    fidelity = "control"
    tags = frozenset({"adaptive"})

    def stages(self):
        signals = tuple(vtc.Signal(name) for name in ("keys", "queries", "received_attention"))

        def compress(tokens, keep, links):
            return vtc.TokenMap.identity(tokens.ends)

        def keep(tokens):
            return torch.zeros(len(tokens.lengths), 0, dtype=torch.long)

        return tuple(vtc.Stage(vtc.Site("tower", i), keep, None, compress, signals) for i in range(3))


@pytest.mark.parametrize("name", BUILD)
def test_blocks_in_two_halves_change_no_bit(name):
    model, pixels = build(name), images()
    before = run(model, pixels)
    outputs, report, _ = watched(model, pixels, KeepsAll(budget=vtc.Budget(ratio=1.0)))
    assert report.tokens == (64,) * 3
    for key, value in outputs.items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("slug", ["tome", "ficoco-v", "token-transforming", "dymu"])
@pytest.mark.parametrize("name", BUILD)
def test_every_method_on_every_encoder_meets_its_budget(name, slug):
    model, pixels = build(name), images()
    outputs, report, _ = watched(model, pixels, slug, 0.25)
    assert report.tokens == (16,) * 3
    assert report.spec == f"{slug}:0.25"
    assert all(bool(torch.isfinite(value).all()) for value in outputs.values())


def test_methods_that_act_there_are_found():
    assert {"tome", "ficoco-v", "token-transforming", "dymu"} <= set(methods_by_themselves())
    assert "visionzip" not in methods_by_themselves()


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "timm", "open_clip", "open_clip-custom"])
@pytest.mark.parametrize("spec", ["tome:0.4", "dymu(thresholds=0.8|0.9|0.9)"])
def test_a_batch_gives_what_each_image_gives_alone(name, spec):
    """With thresholds the images keep different numbers of tokens, and padding is masked."""
    model, pixels = build(name), images()
    pixels[0, :, :24] = 0.5  # a plain image merges more
    together, report, _ = watched(model, pixels, spec)
    if spec.startswith("dymu"):
        assert len(set(report.tokens)) > 1
    for i in range(3):
        alone, single, _ = watched(model, pixels[i : i + 1], spec)
        assert single.tokens == report.tokens[i : i + 1]
        for key, value in alone.items():
            assert relative_difference(together[key][i : i + 1], value) < TOLERANCE, key


@pytest.mark.parametrize("name", BUILD)
def test_blocks_really_run_on_fewer_tokens(name):
    """Rows that enter each attention and each MLP are those of the report."""
    model, pixels = build(name), images(2)
    encoder = encoder_for(model)
    rows, hooks = {}, []
    for i, block in enumerate(encoder.blocks):
        halves = encoder.halves(block)
        for part, module in (("attention", halves.attention), ("mlp", halves.mlp)):

            def note(module, args, kwargs, key=(i, part)):
                rows.setdefault(key, []).append((args[0] if args else kwargs["hidden_states"]).shape[1])

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    _, report, _ = watched(model, pixels, "tome(r=8)")
    for hook in hooks:
        hook.remove()
    prefix = encoder.num_prefix
    # each half is called a second time, where it is silent, at the width of the other one
    assert [rows[i, "attention"][0] - prefix for i in range(3)] == [64, 56, 48]
    assert [rows[i, "mlp"][-1] - prefix for i in range(3)] == [56, 48, 40]

    assert report.flops < report.flops_dense


@dataclasses.dataclass(frozen=True)
class Drops(vtc.Method):
    """Keeps the first patches, at the cost of no product."""

    slug = "drops"
    steps = ("the first ones", "none", "drop")
    fidelity = "control"

    def stages(self):
        def keep(tokens):
            return torch.arange(tokens.budget[0] + tokens.num_prefix).expand(len(tokens.lengths), -1)

        def drop(tokens, keep, links):
            return vtc.TokenMap.select(keep, tokens.x.shape[1])

        return tuple(
            vtc.Stage(vtc.Site("tower", i), keep, None, drop, schedule=lambda n, k, i=i: n - 10 * (i + 1))
            for i in range(3)
        )


@pytest.mark.parametrize("name", BUILD)
def test_flops_are_those_that_torch_counts(name, monkeypatch):
    # torch does not count the fused attention of its own module
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model, pixels = build(name).requires_grad_(False), images(2)

    def counted():
        # the products themselves: which fused attention is counted differs between versions of torch
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(model, pixels)
        return counter.get_total_flops()

    before = counted()
    with vtc.compress_encoder(model, Drops(budget=vtc.Budget(tokens=1))) as handle:
        after, report = counted(), handle.report
    assert report.per_block == ((54,) * 2, (44,) * 2, (34,) * 2)
    assert before - after == report.flops_dense - report.flops
    assert report.flops_dense < before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "ViTForImageClassification"])
def test_hidden_states_are_on_the_full_grid(name, attention):
    model, pixels = build(name, attention), images()
    blocks, left = encoder_for(model).blocks, []
    with vtc.compress_encoder(model, "tome(r=8)") as handle, torch.no_grad():
        hooks = [block.register_forward_hook(lambda module, args, output: left.append(output)) for block in blocks]
        states = model(pixels, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        prefix = handle.report.prefix
        with pytest.raises(vtc.VTCError, match="return_dict=True"):
            blocks_of_tuple(model, pixels)
    assert [len(state[0]) for state in states] == [64 + prefix] * 4
    for i in range(2):
        assert left[i].shape[1] == 56 - 8 * i + prefix
        # every row of the state is a row of what left the block, and none of those is missing
        same = (states[i + 1][:, :, None] == left[i][:, None]).all(dim=3)
        assert bool(same.any(dim=2).all()) and bool(same.any(dim=1).all())


def blocks_of_tuple(model, pixels):
    entry = encoder_for(model).tower
    x = pixels if hasattr(entry, "embeddings") else torch.randn(1, 65, 32)
    return entry(x, output_hidden_states=True, return_dict=False)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "timm"])
def test_short_tokens_and_sizes(name):
    model, pixels = build(name), images()
    with vtc.compress_encoder(model, "tome", budget=10) as handle, torch.no_grad():
        if name == "timm":
            states = model.forward_features(pixels)
        else:
            states = model(pixels).last_hidden_state
        report = handle.report
    tokens, sizes = report.gather(states), report.sizes
    assert tokens.shape == (3, 10, 32) and sizes.shape == (3, 10)
    assert torch.equal(sizes.sum(dim=1), torch.full((3,), 64.0))
    patches = states[:, report.prefix :]
    # the mean of the patches is the mean of the tokens by size
    mean = (tokens * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)
    assert relative_difference(patches.mean(dim=1), mean) < TOLERANCE
    assert torch.equal(report.gather(patches), tokens)
    assert report.layout.grids == (((8, 8),),) * 3
    with pytest.raises(vtc.VTCError, match="of the last call"):
        report.gather(states[:2])
    assert "tome:10" in str(report) and report.to_dict()["tokens"] == (10,) * 3


def test_an_image_that_is_no_square_has_its_own_grid():
    model = build("CLIPVisionModel")
    with vtc.compress_encoder(model, "ficoco-v", 0.5) as handle, torch.no_grad():
        model(torch.randn(1, 3, 16, 64), interpolate_pos_encoding=True)
        assert handle.report.layout.grids == (((4, 16),),)
        assert handle.report.tokens == (32,)


def test_a_patch_inside_a_patch_is_put_back():
    model, pixels = build("Dinov2Model"), images()
    handle = vtc.patch_encoder(model, "tome", 0.5)
    with vtc.compress_encoder(model, "tome", 0.25) as inner:
        assert not handle.active
        run(model, pixels)
        assert inner.report.tokens == (16,) * 3
    run(model, pixels)
    assert handle.active and handle.report.tokens == (32,) * 3
    handle.remove()


def test_a_forgotten_model_goes_away():
    model = build("CLIPVisionModel")
    vtc.patch_encoder(model, "tome", 0.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_error_leaves_nothing_behind():
    model, pixels = build("CLIPVisionModel"), images()
    broken = pixels.clone()
    broken[1] = torch.nan
    with vtc.compress_encoder(model, "tome", 0.5):
        once = run(model, pixels)
        with pytest.raises(vtc.VTCError, match="NaN"):
            run(model, broken)
        again = run(model, pixels)
    assert all(torch.equal(once[key], again[key]) for key in once)


REFUSED = {
    "visionzip:8": "nothing but its blocks.*tome",
    "fastv@1:0.5": "nothing but its blocks",
    "ficoco-vl:0.5": "nothing but its blocks",
    "tome@3:0.5": r"blocks 0\.\.2",
    "tome": "has no budget",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_methods_that_do_not_fit_are_refused(spec):
    model = build("CLIPVisionModel")
    with pytest.raises(vtc.VTCError, match=REFUSED[spec]):
        vtc.patch_encoder(model, spec)
    assert all("forward" not in vars(module) for module in model.modules())


@dataclasses.dataclass(frozen=True)
class ReadsCls(KeepsAll):
    slug = "reads-cls"
    wanted: str = "cls_attention"

    def stages(self):
        return (dataclasses.replace(super().stages()[0], signals=(vtc.Signal(self.wanted),)),)


def test_signals_that_do_not_exist_are_refused():
    budget = vtc.Budget(ratio=0.5)
    with pytest.raises(vtc.VTCError, match=r"no \[CLS\]"):
        vtc.patch_encoder(build("SiglipVisionModel"), ReadsCls(budget=budget))
    with pytest.raises(vtc.VTCError, match="does not capture it inside a tower"):
        vtc.patch_encoder(build("CLIPVisionModel"), ReadsCls("text_embeds", budget=budget))
    registers = timm_model("sdpa", class_token=False, reg_tokens=2, global_pool="avg")
    with pytest.raises(vtc.VTCError, match="here it is a register"):
        vtc.patch_encoder(registers, "ficoco-v", 0.5)


def test_models_that_are_not_known_are_refused():
    with pytest.raises(vtc.VTCError, match="Others need pre-norm blocks"):
        vtc.patch_encoder(nn.Sequential(nn.Linear(4, 4)), "tome", 0.5)
    with pytest.raises(vtc.VTCError, match=r"Use vtc\.patch"):
        vtc.patch_encoder(tiny("llava").model, "tome", 0.5)
    both = nn.ModuleList([build("CLIPVisionModel"), build("Dinov2Model")])
    with pytest.raises(vtc.VTCError, match="holds 2 encoders"):
        vtc.patch_encoder(both, "tome", 0.5)
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    packed = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4))
    with pytest.raises(vtc.VTCError, match="padded to a common number"):
        vtc.patch_encoder(packed, "tome", 0.5)
    with torch.device("meta"):
        unloaded = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, intermediate_size=64))
    with pytest.raises(vtc.VTCError, match="meta device"):
        vtc.patch_encoder(unloaded, "tome", 0.5)


def test_blocks_of_another_anatomy_are_refused():
    vision_transformer = importlib.import_module(pytest.importorskip("timm").__name__ + ".models.vision_transformer")
    with pytest.raises(vtc.VTCError, match="ResPostBlock"):
        vtc.patch_encoder(timm_model("sdpa", block_fn=vision_transformer.ResPostBlock), "tome", 0.5)
    with pytest.raises(vtc.VTCError, match="DiffAttention"):
        vtc.patch_encoder(timm_model("sdpa", attn_layer="diff"), "tome", 0.5)
    with pytest.raises(vtc.VTCError, match="scaled cosines"):
        vtc.patch_encoder(open_clip_model("sdpa", block_type="custom", scaled_cosine_attn=True), "tome", 0.5)


def test_flash_attention_is_refused_where_it_would_be_wrong():
    model = build("CLIPVisionModel")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtc.VTCError, match=r"flash_attention_2.*no argument"):
        vtc.patch_encoder(model, "tome", 0.5)
    vtc.patch_encoder(model, "tome(proportional=false)", 0.5).remove()


def test_what_is_patched_already_is_refused():
    model = build("CLIPModel")
    handle = vtc.patch_encoder(model, "tome", 0.5)
    with pytest.raises(vtc.VTCError, match=r"already patched with 'tome:0\.5'"):
        vtc.patch_encoder(model.vision_model, "tome", 0.25)
    handle.remove()
    vtc.patch_encoder(model.vision_model, "tome", 0.25).remove()

    llava = tiny("llava").model
    tower = llava.model.vision_tower
    with vtc.compress(llava, "tome:8"), pytest.raises(vtc.VTCError, match="part of a model that is patched"):
        vtc.patch_encoder(tower, "tome", 0.5)
    with vtc.compress_encoder(tower, "tome", 0.5), pytest.raises(vtc.VTCError, match="patched by itself"):
        vtc.patch(llava, "visionzip:8")
    vtc.patch(llava, "visionzip:8").remove()


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_ways_around_the_blocks_are_refused(name):
    model, pixels = build(name), images(1)
    stock = model.forward_intermediates(pixels)
    with vtc.compress_encoder(model, "tome", 0.5) as handle, torch.no_grad():
        with pytest.raises(vtc.VTCError, match="no report yet"):
            _ = handle.report
        with pytest.raises(vtc.VTCError, match="hands out tokens between the blocks"):
            model.forward_intermediates(pixels)
        with pytest.raises(vtc.VTCError, match="something else than"):
            encoder_for(model).blocks[0](torch.randn(1, 65, 32))
        if name == "timm":
            with pytest.raises(vtc.VTCError, match="attn_mask hides patches"):
                model(pixels, attn_mask=torch.zeros(65, 65))
    assert type(model.forward_intermediates(pixels)) is type(stock)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "timm", "open_clip"])
def test_gradient_checkpointing_is_refused(name):
    model = build(name).train()
    if name == "CLIPVisionModel":
        for block in encoder_for(model).blocks:
            block.gradient_checkpointing = True
            # older hosts look for it
            block._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False
            )
    else:
        model.set_grad_checkpointing()
    with vtc.compress_encoder(model, "tome", 0.5), pytest.raises(vtc.VTCError, match="checkpointing"):
        model(images(1))


def test_padded_patches_are_refused():
    model, pixels = build("Dinov2Model"), images(1)
    mask = torch.ones(1, 65, dtype=torch.long)
    mask[:, 40:] = 0
    with vtc.compress_encoder(model, "tome", 0.5), pytest.raises(vtc.VTCError, match="padded inside"):
        model(pixels, attention_mask=mask)


def test_zero_shot_through_open_clip():
    """A whole CLIP of open_clip: the text tower stays as it is, image features change."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=4, width=64, head_width=32, layers=3),
        text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1),
    ).eval()
    text = torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        image, words = model.encode_image(images()), model.encode_text(text)
        with vtc.compress_encoder(model, "tome", 0.5) as handle:
            fewer, same = model.encode_image(images()), model.encode_text(text)
            assert handle.report.tokens == (32,) * 3
    assert torch.equal(words, same)
    assert fewer.shape == image.shape and not torch.equal(fewer, image)


def test_timm_inside_open_clip():
    library = importlib.import_module(pytest.importorskip("open_clip").__name__ + ".timm_model")
    model = library.TimmModel("test_vit", embed_dim=16, image_size=160, pool="token", proj="linear").eval()
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad(), vtc.compress_encoder(model, "tome", 0.5) as handle:
        assert model(pixels).shape == (2, 16)
        assert handle.report.tokens == (50, 50)
