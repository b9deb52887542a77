"""GreedyPrune: no published code or vectors; the procedure against a plain list."""

import pytest
import torch
from torch.nn.functional import normalize

import vtc


def greedy_list(x, saliency, count, threshold):
    """Float64 definition: walk down the saliency, skip what is like a kept token, then fill up."""
    x = normalize(x.double(), dim=-1)
    order = saliency.sort(descending=True, stable=True).indices.tolist()
    kept = []
    for i in order:
        if len(kept) < count and all(float(x[i] @ x[j]) <= threshold for j in kept):
            kept.append(i)
    return kept + [i for i in order if i not in kept][: count - len(kept)]


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.9, 1.1])
@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("layer", [0, 2])
def test_against_a_plain_list(threshold, query, layer):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    x = centres[torch.arange(40) % 6] + 0.4 * torch.randn(40, 8, generator=generator)
    text = torch.randn(1, 7, 8, generator=generator)
    mask = torch.arange(7)[None] < 5
    names = ("normed_states", "text_states") if layer else ("unused", "text_embeds")
    tokens = vtc.Tokens.of(x[None], 12, **{names[0]: x[None], names[1]: text, "text_mask": mask})
    picks = vtc.create("greedyprune", threshold=threshold, query=query, layer=layer).picks(tokens)
    wanted = text[0, 4] if query == "last" else text[0, :5].mean(0)
    saliency = normalize(x.double(), dim=-1) @ wanted.double()
    assert picks[0].tolist() == greedy_list(x, saliency, 12, threshold)


def test_duplicates_wait_until_nothing_else_is_left():
    x = torch.eye(4)[[0, 0, 0, 1, 2]]
    text = torch.tensor([[[1.0, 0.5, 0.2, 0.0]]])
    tokens = vtc.Tokens.of(x[None], 4, text_embeds=text, text_mask=torch.ones(1, 1, dtype=torch.bool))
    assert vtc.create("greedyprune", layer=0).picks(tokens).tolist() == [[0, 3, 4, 1]]


def test_layer_of_a_spec_string():
    method = vtc.parse("greedyprune@5:16")[0]
    assert method.layer == 5
    assert str(method.stages()[0].site) == "layer[5]"
