"""Compiles every Triton kernel for sm_90 without a device: `python tests/kernels/compile_sm90.py`.

The launchers run as they are on CPU tensors, but a launch is recorded instead of executed; each distinct launch is then
compiled ahead of time with the argument types, specialisations and constants that it would have had. Prints one JSON
object per kernel with its shared memory, registers spilled and instruction counts. Run as a script, in its own process.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vtc.kernels as kernels
from vtc.kernels import _dispatch, _tiles

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
launches = []


def record(kernel, grid):
    return lambda *arguments, **options: launches.append((kernel.compiled(), arguments, options))


def prepare():
    """Turns launches into records, and lets CPU tensors through as if they were on the device."""
    _dispatch.LazyKernel.__getitem__ = record
    _dispatch._triton_obstacle = lambda tensor: None
    arithmetic = {"UPCAST": False, "PRECISION": "tf32x3"}
    _tiles.dot_arithmetic = lambda x: arithmetic
    for name, module in list(sys.modules.items()):
        if name.startswith("vtc.kernels.") and hasattr(module, "dot_arithmetic"):
            module.dot_arithmetic = _tiles.dot_arithmetic


def call_operations(dtype):
    def new(*shape):
        return torch.zeros(shape, dtype=dtype)

    x, narrow, mask = new(2, 576, 1024), new(2, 1000, 64), torch.ones(2, 576, dtype=torch.bool)
    score, segments = torch.ones(2, 576), torch.zeros(2, 576, dtype=torch.int64)
    for options in ({}, {"topk": 4, "source_mask": mask, "target_mask": mask}):
        kernels.cosine_match(x, x, impl="triton", **options)
    kernels.similarity_degree(x, impl="triton")
    kernels.similarity_degree(x, reduce="count", threshold=0.5, include_self=False, impl="triton")
    kernels.similarity_propagate(x, score, threshold=0.5, temperature=0.03, impl="triton")
    kernels.similarity_propagate(x, score, threshold=0.5, impl="triton")
    q, k = new(1, 8, 577, 128), new(1, 2, 577, 128)
    kernels.received_attention(q, k, impl="triton")
    kernels.received_attention(q, k, segments=segments[:1, :1].expand(1, 577), causal=True, impl="triton")
    kernels.attention_rows(q[:, :, :3], k, impl="triton")
    kernels.attention_rows(q[:, :, :3], k, mask=torch.ones(1, 577, dtype=torch.bool), softmax=False, impl="triton")
    for tokens, scores in ((x, score), (narrow, torch.ones(2, 1000))):
        kernels.farthest_point(tokens, 4, impl="triton")
        kernels.max_min(tokens, 4, weight=scores, bonus=scores, impl="triton")
        kernels.max_sum(tokens, 4, impl="triton")
        kernels.dpp_map_features(tokens, scores, 4, impl="triton")
    kernels.dpp_map(new(1, 64, 64), 4, impl="triton")
    kernels.dpp_map(new(1, 1, 1).expand(1, 16400, 16400), 2, impl="triton")
    kernels.segment_merge(x, segments, 64, impl="triton")
    kernels.segment_merge(x, segments, 64, weights=score, reduce="sum", impl="triton")
    kernels.frame_similarity(new(1, 4, 196, 1024), impl="triton")
    kernels.temporal_match(torch.zeros(1, 3, 196), 0.9, impl="triton")
    kernels.compact(segments[:, :64], x, impl="triton")
    kernels.compact(
        segments[:, :64],
        x,
        cos=new(1, 576, 128),
        sin=new(1, 576, 128),
        position_ids=segments.expand(3, 2, 576),
        mask=mask[:, None, None],
        impl="triton",
    )


def source_of(kernel, arguments, options):
    """The ASTSource of one launch: 1 is a constant and multiples of 16 are marked, as the launcher would do."""
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named.update({key: value for key, value in options.items() if key in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = named[name]
        if kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def main():
    prepare()
    for dtype in (torch.bfloat16, torch.float32):
        call_operations(dtype)
    seen = {}
    for kernel, arguments, options in launches:
        is_repeat = arguments[0].dtype == torch.float32 and "PRECISION" not in kernel.arg_names
        if is_repeat and any(key[:2] == (kernel.fn.__module__, kernel.fn.__name__) for key in seen):
            continue  # float32 differs only where there is a dot product
        source = source_of(kernel, arguments, options)
        pointers = tuple(t for t in source.signature.values() if t.startswith("*"))
        constants = tuple(
            str(value) for place, value in source.constants.items() if kernel.params[place[0]].is_constexpr
        )
        seen.setdefault((kernel.fn.__module__, kernel.fn.__name__, pointers, constants), (source, options))
    for (module, name, pointers, _), (source, options) in seen.items():
        warps = options.get("num_warps", 4)
        binary = triton.compile(source, target=TARGET, options={"num_warps": warps, **_dispatch.COMPILE_OPTIONS})
        ptx = binary.asm["ptx"]
        print(
            json.dumps(
                {
                    "kernel": f"{module}.{name}",
                    "input": pointers[0],
                    "warps": warps,
                    "shared_bytes": binary.metadata.shared,
                    "matrix_instructions": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
                    "cubin_bytes": len(binary.asm["cubin"]),
                }
            )
        )


if __name__ == "__main__":
    main()
