"""Every registered method keeps the contract of a method."""

import dataclasses

import pytest
import torch

import vtc
from vtc.testing.conformance import CHECKS, check_method

#: options beside the defaults that change what a method does
VARIANTS = [
    "fastervlm(score=received)",
    "visionzip(variant=reference)",
    "visionzip(score=received)",
    "visionzip(contextual=0.0)",
    "fastv(query=mean)",
    "random(seed=3)",
    "vispruner(score=received, important=0.75)",
    "cdpruner(relevance=llm)",
    "prumerge(adaptive=false)",
    "prumerge-plus(adaptive=false, score=received)",
    "greedyprune(layer=0, query=mean)",
    "todre(pivot=random, objective=k_center)",
    "todre(pivot=farthest)",
    "efficientvla(direction=to_text)",
    "flashvla(source=hidden)",
    "fopru(strategy=row)",
    "hired(variant=reference)",
    "learning-free(rule=top)",
    "sparsity-meets-similarity(inflection=lof)",
    "tome(inflection=-1.0, proportional=false)",
    "tome(r=3)",
    "token-transforming(spread=1, blocks=0.5)",
    "ficoco-v(variant=reference)",
    "ficoco-v(attention=softmax, penalty=false)",
    "ficoco-l(variant=reference)",
    "ficoco-l(attention=softmax)",
    "shortv@0|2",
    "lvlm-csp(selector=cls, query=text)",
    "lvlm-csp(selector=random)",
    "star(relevance=logits)",
    "topv(marginals=norm, importance=max)",
    "topv(recover=0.0)",
    "todre(stage=2, tau=0.5)",
    "sparsity-meets-similarity(relevance=mean)",
    "sparsity-meets-similarity(second_ratio=0.5)",
    "mustdrop-llm(key=received, global_threshold=0.05, individual_threshold=0.05)",
    "mustdrop-llm(key=none)",
    "pyramiddrop(convention=average)",
    "sparsevlm(rule=rank, scale=2.0)",
    "sparsevlm(variant=reference)",
    "sparsevlm(place=own)",
    "sparsevlm(rule=rank, variant=reference, recycle=0.0)",
    "sparsevlm-plus(variant=reference)",
    "sparsevlm-plus(recycle=0.3, gravity=false, heads=0)",
    "sparsevlm-plus(rule=rank)",
    "promptdistill(pool=none)",
    "promptdistill(pool=grid)",
    "promptdistill(variant=reference, truncate_cache=-1)",
    "aim(variant=reference)",
    "aim(prune=false)",
]
METHODS = [vtc.create(slug, budget=8) for slug in vtc.methods()] + [vtc.parse(v, 8)[0] for v in VARIANTS]
CASES = [
    pytest.param(method, stage, check, id=f"{vtc.format_spec(method)}-{stage.site}-{check.__name__[6:]}")
    for method in METHODS
    for stage in method.stages()
    for check in CHECKS
]


@pytest.mark.parametrize(("method", "stage", "check"), CASES)
def test_contract(method, stage, check):
    check(method, stage)


class TestTheChecksThemselves:
    """A check that nobody has seen fail is not a check."""

    @staticmethod
    def broken(filter):
        @dataclasses.dataclass(frozen=True)
        class Broken(vtc.Method):
            slug = "random"
            steps = ("broken", "none", "drop")
            fidelity = "control"

            def stages(self):
                return (vtc.Stage(vtc.Site("llm_in"), filter),)

        return Broken(budget=vtc.Budget(tokens=8))

    def test_a_token_too_many(self):
        def too_many(tokens):
            return torch.arange(max(tokens.budget)).expand(len(tokens.lengths), -1)

        with pytest.raises(AssertionError):
            check_method(self.broken(too_many))

    def test_the_same_token_twice(self):
        def twice(tokens):
            return torch.zeros(len(tokens.lengths), max(tokens.budget), dtype=torch.long)

        with pytest.raises(AssertionError):
            check_method(self.broken(twice))

    def test_the_first_group_decides_for_all(self):
        def first(tokens):
            best = tokens.x[:1].norm(dim=-1).masked_fill(~tokens.mask[:1], -1).argsort(descending=True)
            keep = best[:, : max(tokens.budget)].sort().values.expand(len(tokens.lengths), -1)
            return keep.masked_fill(torch.arange(keep.shape[1]) >= torch.tensor(tokens.budget)[:, None], -1)

        with pytest.raises(AssertionError):
            check_method(self.broken(first))

    def test_the_global_generator(self):
        def drawing(tokens):
            torch.rand(1)
            keep = torch.arange(max(tokens.budget)).expand(len(tokens.lengths), -1)
            return keep.masked_fill(keep >= torch.tensor(tokens.budget)[:, None], -1)

        with pytest.raises(AssertionError, match="random state"):
            check_method(self.broken(drawing))
