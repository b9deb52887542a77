"""Words of the user are checked before a model is loaded, and transformers is not imported for it."""

import subprocess
import sys

import pytest
import torch

import vtc
from vtc import settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot32"}, "dtype='flaot32' is unknown. Use 'auto', 'float32', 'bfloat16' or 'float16'."),
        ({"attention": "spda"}, "attention='spda' is unknown. Use 'eager', 'sdpa',"),
        ({"device": "gpu"}, "device='gpu' is unknown. Use 'cpu', 'cuda' or 'cuda:1', or leave it out."),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, f"torch sees {torch.cuda.device_count()} GPUs here"),
        ({"name": "/nowhere/at/all"}, "cannot load '/nowhere/at/all': there is no such folder"),
        ({"name": "some/where/else"}, "there is no such folder"),
    ],
)
def test_a_model_is_not_loaded_with_wrong_words(options, message):
    with pytest.raises(vtc.VTCError) as caught:
        vtc.load(**options)
    assert message in str(caught.value)


def test_what_is_right_passes(tmp_path):
    for policy in (*settings.POSITIONS, "auto"):
        settings.check_positions(policy)
    for dtype in settings.DTYPES:
        settings.check_dtype(dtype)
        assert dtype == "auto" or isinstance(getattr(torch, dtype), torch.dtype)
    for attention in (None, *settings.ATTENTION, "kernels-community/flash-attn"):
        settings.check_attention(attention)
    for device in (None, "cpu", "meta", "auto"):
        settings.check_device(device)
    for name in (None, "llava-hf/llava-1.5-7b-hf", "gpt2", str(tmp_path)):
        settings.check_model(name)


def test_refusing_needs_no_transformers():
    code = "import sys, vtc\ntry: vtc.load(device='gpu')\nexcept vtc.SpecError: print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
