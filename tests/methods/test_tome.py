"""ToMe's matching, merging, schedules and whole blocks against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.adapters._vit import halves, tower_attention
from vtc.engine.host.override import Undo
from vtc.engine.plan import Step
from vtc.engine.planning import make_plan
from vtc.engine.vision import passage as tower
from vtc.primitives import even_pace, linear_counts, linear_pace
from vtc.testing import tiny
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = [case for case in golden_cases("tome", FOLDER) if "x0" in case]
SCHEDULES = golden_cases("tome", FOLDER, kind="schedule")
TOWERS = golden_cases("tome", FOLDER, kind="vit")


def test_all_kinds_are_dispatched():
    assert STEPS and SCHEDULES and TOWERS
    assert {str(c) for c in STEPS + SCHEDULES + TOWERS} == {str(c) for c in golden_cases("tome", FOLDER)}


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_golden_steps(case):
    x, prefix = case["x0"], case.number("class_token") + case.number("distill_token")
    total, sizes = None, torch.ones(x.shape[:2])
    method, step = vtc.create("tome"), 0
    while f"s{step}_r" in case:
        metric = case[f"s{step}_metric"]
        torch.testing.assert_close(x @ case["metric_proj"], metric, atol=1e-4, rtol=1e-4)
        budget = x.shape[1] - prefix - case.number(f"s{step}_r")
        tokens = vtc.Tokens.of(x, budget, num_prefix=prefix, keys=metric[:, None], sizes=sizes)
        token_map = method.stages()[0].decide(tokens)
        first, second = (case[f"s{step}_{name}_idx"] for name in ("unm", "dst"))
        odd = torch.arange(1, x.shape[1], 2).expand(len(x), -1)
        order = torch.cat([first * 2, odd], dim=1)
        if case.number("distill_token"):  # the class and the distillation token go in front
            order = torch.cat([first[:, :1] * 2, odd[:, :1], first[:, 1:] * 2, odd[:, 1:]], dim=1)
        assert torch.equal(token_map.anchor, order)
        source = case[f"s{step}_src_idx"] * 2
        target = token_map.sources().gather(1, source)
        assert torch.equal(token_map.anchor.gather(1, target), second * 2 + 1)
        torch.testing.assert_close(token_map.apply(x), case[f"s{step}_x"], atol=1e-5, rtol=1e-5)
        total = token_map if total is None else total.then(token_map)
        torch.testing.assert_close(total.sizes(), case[f"s{step}_size"])
        assert torch.equal(total.matrix(mass=True) > 0, case[f"s{step}_source"].bool())
        x, sizes, step = case[f"s{step}_x"], total.sizes(), step + 1
    assert step == len(case["r_requested"].reshape(-1))


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_golden_schedules(case):
    for i, (layers, r, inflection) in enumerate(case["cases"].tolist()):
        assert linear_counts(int(r), inflection, int(layers)) == case[f"r{i}"].tolist()


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_golden_blocks(case):
    """The recorded timm blocks as SigLIP blocks, run by the engine on a bare tower."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    x, counts = case["x_in"], case["r_list"].tolist()
    config = SiglipVisionConfig(
        hidden_size=x.shape[2],
        intermediate_size=case["w_blocks.0.mlp.fc1.weight"].shape[0],
        num_attention_heads=case.number("num_heads"),
        num_hidden_layers=len(counts),
        layer_norm_eps=case.number("eps"),
        hidden_act="gelu",
        attn_implementation="sdpa",
    )
    encoder = SiglipEncoder(config).eval()
    for i, block in enumerate(encoder.layers):
        load(block, {name: case[f"w_blocks.{i}.{name}"] for name in WEIGHTS})
    r, inflection = case["r_arg"].tolist()
    method = vtc.create("tome", r=int(r), inflection=inflection)
    (general,) = method.stages()
    steps = {
        i: (Step(method, stage, method.budget_for(stage)),) for i, stage in enumerate(general.repeated(len(counts)))
    }
    length = x.shape[1] - 1
    passage = tower.Passage(
        steps, 1, length, (length,) * len(x), None, scheduled(length), [*range(len(x))], x.device, implementation="sdpa"
    )
    undo, found, sizes = Undo(), [], []
    for block in encoder.layers:
        block.register_forward_hook(lambda module, args, output: found.append(output))
        block.register_forward_hook(lambda module, args, output: sizes.append(passage.token_map.sizes()))
    parts = halves, tower_attention
    tower.attach(encoder, tuple(encoder.layers), parts, steps, lambda: passage, lambda hidden: passage, undo)
    with torch.no_grad():
        expanded = encoder(inputs_embeds=x).last_hidden_state
    for i in range(len(counts)):
        torch.testing.assert_close(found[i], case[f"block{i}_out"], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sizes[i], case[f"block{i}_size"])
    assert torch.equal(passage.token_map.matrix(mass=True) > 0, case[f"block{i}_source"].bool())
    member = case[f"block{i}_source"].long().argmax(dim=1)  # the group of each token
    wanted = case[f"block{i}_out"].gather(1, member[..., None].expand_as(x))
    torch.testing.assert_close(expanded, wanted, atol=2e-5, rtol=1e-4)
    undo.take_off()
    assert all("forward" not in vars(module) for module in encoder.modules())


WEIGHTS = [
    f"{part}.{kind}"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def load(block, weights):
    names = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}
    state = {}
    for name, value in weights.items():
        part, kind = name.rsplit(".", 1)
        if part == "attn.qkv":
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                state[f"self_attn.{letter}_proj.{kind}"] = piece
        else:
            state[f"{names.get(part, part)}.{kind}"] = value
    block.load_state_dict(state)


def scheduled(length):
    def targets(step, current):
        return tuple(min(n, step.stage.schedule(length, step.budget.tokens)) for n in current)

    return targets


@pytest.mark.parametrize(
    ("total", "budget", "steps"), [(576, 64, 23), (16, 1, 2), (257, 256, 24), (7, 3, 1), (50, 50, 5)]
)
@pytest.mark.parametrize("inflection", [-1.0, -0.3, 0.0, 1.0])
def test_schedules_end_at_the_budget(total, budget, steps, inflection):
    counts = [linear_pace(total, budget, i, steps, inflection=inflection) for i in range(steps)]
    assert counts[-1] == budget
    assert all(a >= b for a, b in zip([total, *counts], counts, strict=False))
    if inflection == 0:
        assert all(abs(a - even_pace(total, budget, i, steps)) <= 1 for i, a in enumerate(counts))


def test_a_block_may_merge_more_than_half():
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(2, 41, 8, generator=generator), torch.randn(2, 2, 41, 4, generator=generator)
    sizes = torch.randint(1, 4, (2, 41), generator=generator).float()
    tokens = vtc.Tokens.of(x, 3, num_prefix=1, keys=keys, sizes=sizes)
    token_map = vtc.create("tome").stages()[0].decide(tokens)
    assert token_map.lengths == (4, 4)
    assert token_map.anchor[:, 0].tolist() == [0, 0]
    # every group is the mean of its members by size, and every token is in one group
    member = token_map.matrix(mass=True)
    assert torch.equal(member.sum(dim=1), torch.ones(2, 41))
    weight = member * sizes[:, None]
    torch.testing.assert_close(token_map.apply(x), weight @ x / weight.sum(dim=2, keepdim=True))


def test_constant_number_per_block_without_a_budget():
    one = tiny("llava")
    with vtc.compress(one.model, "tome(r=3)") as handle, torch.no_grad():
        one.model(**one.inputs())
        assert handle.report.entering == (16 - 2 * 3,)
    with vtc.compress(one.model, "tome:13(r=3)") as handle, torch.no_grad():
        one.model(**one.inputs())
        assert handle.report.entering == (13,)


def test_late_blocks_and_flash_attention_are_refused():
    one = tiny("llava")
    adapter = adapter_for(one.model)
    with pytest.raises(vtc.VTCError, match=r"blocks 0\.\.1"):
        make_plan(adapter, vtc.parse("tome@2:8"), "original", size_bias=False)
    adapter.encoders[0].tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtc.VTCError, match="flash_attention_2"):
        make_plan(adapter, vtc.parse("tome:8"), "original", size_bias=False)
    make_plan(adapter, vtc.parse("tome:8(proportional=false)"), "original", size_bias=False)
