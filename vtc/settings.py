"""Settings that users write as words, checked before anything slow. Free of torch, but for the check of a device."""

from pathlib import Path

from vtc.errors import SpecError, UnsupportedModelError

#: position policies, as `vtc.patch` takes them beside "auto"
POSITIONS = ("original", "compact", "renumber")
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: attention implementations whose masks vtc can cut; a kernel of the hub, "owner/name", is taken as it is
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
#: what accelerate spreads over several devices by itself
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_positions(positions: str) -> None:
    """Refuse a position policy that does not exist.

    Raises:
        SpecError: it does not.
    """
    _check("positions", positions, (*POSITIONS, "auto"))


def check_dtype(dtype: str) -> None:
    """Refuse a dtype in which no model is loaded.

    Raises:
        SpecError: it is none of `DTYPES`.
    """
    _check("dtype", dtype, DTYPES)


def check_attention(attention: str | None) -> None:
    """Refuse an attention implementation that vtc cannot compress; None is the model's default.

    Raises:
        SpecError: it is neither one of `ATTENTION` nor a kernel of the hub.
    """
    if attention is not None and "/" not in attention:
        _check("attention", attention, ATTENTION)


def check_model(name: str | None) -> None:
    """Refuse a path to a model that does not exist; None is the embedded model, and hub ids are not asked for.

    Raises:
        UnsupportedModelError: it is a path, and nothing is there.
    """
    if name is None or Path(name).exists():
        return
    # a hub id is "name" or "owner/name"
    if name.startswith((".", "/", "~")) or len(Path(name).parts) > 2:
        raise UnsupportedModelError(f"cannot load {name!r}: there is no such folder. Give a folder or a hub id.")


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not have; None is a GPU if there is one.

    Raises:
        SpecError: it is misspelled, or there is no such GPU.
    """
    if device is None or device in DEVICE_MAPS:
        return
    import torch  # here, because it takes seconds

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"device={device!r} is unknown. Use 'cpu', 'cuda' or 'cuda:1', or leave it out.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SpecError(
            f"device={device!r}: torch sees {torch.cuda.device_count()} GPUs here. Use 'cpu', or leave it out."
        )


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        words = ", ".join(map(repr, allowed[:-1]))
        raise SpecError(f"{name}={value!r} is unknown. Use {words} or {allowed[-1]!r}.")
