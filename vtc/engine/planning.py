"""From methods to a plan: stages in the order of their sites, positions and sizes as the papers have them."""

from vtc.adapter import Adapter
from vtc.companion import ClipCompanion
from vtc.engine import refusals
from vtc.engine.host import contract, names
from vtc.engine.plan import Plan, Step
from vtc.stages import Method


def make_plan(
    adapter: Adapter,
    methods: tuple[Method, ...],
    positions: str,
    size_bias: bool | None,
    companion: ClipCompanion | None = None,
    unmerge: bool | None = None,
) -> Plan:
    """Order the stages of `methods` and check that `adapter`'s model can run them.

    `size_bias` and `unmerge` None: what the methods' papers do.

    Raises:
        UnsupportedModelError: the installed transformers is not one that was tested, or its words have changed.
        BudgetError: a stage has no budget.
        SpecError: a layer that the model does not have, or an unknown position policy.
        SignalUnavailableError: a stage reads what the model cannot give.
        UnsupportedFeatureError: a combination that would be wrong.
    """
    contract.check(adapter)
    depth = {"layer": len(adapter.layers), "tower": min(encoder.reach for encoder in adapter.encoders)}
    steps = [
        Step(method, stage, method.budget_for(stage))
        for method in methods
        for general in method.stages_in(len(adapter.layers))
        for stage in general.at_depth(depth.get(general.site.name, 0)).repeated(depth.get(general.site.name, 0))
    ]
    steps.sort(key=lambda step: step.stage.site.order)
    virtual = any(method.unmerges for method in methods) if unmerge is None else unmerge
    if positions == "auto":
        positions = "original" if virtual else _published_positions(adapter, methods)
    refusals.check_positions(adapter, positions)
    for step in steps:
        refusals.check_step(adapter, step, companion)
    refusals.check_together(adapter, steps)
    biased = any(method.size_bias for method in methods) if size_bias is None else size_bias
    if biased:
        refusals.check_biased(names.attention_of(adapter.text_config))
    plan = Plan(methods, tuple(steps), positions, biased, companion, virtual)
    if virtual:
        refusals.check_unmerge(adapter, plan)
    return plan


def _published_positions(adapter: Adapter, methods: tuple[Method, ...]) -> str:
    """What the first method's paper does, as far as it has a meaning for the model."""
    if not methods or adapter.multimodal_positions:
        return "original"
    published = methods[0].positions
    return "compact" if published == "renumber" and not adapter.renumbers else published
