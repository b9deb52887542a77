"""`vtc run`: one image and one question, with all visual tokens and with a budget."""

import random
from pathlib import Path
from typing import Annotated

import typer

from vtc.budget import Budget
from vtc.cli import Json, app, print_json
from vtc.eval.cli._options import Attention, Device, Dtype, Positions, refuse


@app.command("run")
def run_command(
    image: Annotated[Path | None, typer.Option(help="A photograph or drawing. None: a scene is drawn.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask. None: a question about the drawn scene.")] = None,
    method: Annotated[
        str, typer.Option(help="A method or a spec string such as 'fastervlm:128 + dart@2:64'; see `vtc methods`.")
    ] = "visionzip",
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens that stay: 64, or a share such as 0.11 or 11%.")
    ] = "64",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a checkpoint. None: the embedded model.")
    ] = None,
    positions: Positions = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs for the time to first token.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of the drawn scene.")] = 0,
    overlay: Annotated[Path, typer.Option(help="Where to write the picture of the token map.")] = Path(
        "vtc-overlay.png"
    ),
    as_json: Json = False,
) -> None:
    """Ask a model about an image with all visual tokens and with a budget, and compare."""
    if budget is not None:
        Budget.of(budget)
    refuse(
        [method],
        positions=positions,
        dtype=dtype,
        attention=attention,
        model=model,
        device=device,
        reads={"image": image},
        writes=overlay,
    )
    from vtc.eval.bench.prompt import run
    from vtc.eval.cli._shown import show_run
    from vtc.eval.scenes.draw import draw_scene, questions
    from vtc.loading import load, open_image

    expected = None
    if image is None:
        scene = draw_scene(seed)
        picture = scene.image
        if question is None:
            chosen = random.Random(seed).choice(questions(scene, random.Random(seed)))
            question, expected = chosen.prompt, chosen.answer
    else:
        picture = open_image(image)
        question = question or "What is in the picture?"
    result = run(
        load(model, device, dtype, attention),
        picture,
        question,
        method,
        budget,
        positions=positions,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        picture=overlay,
        expected=expected,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        show_run(result)
