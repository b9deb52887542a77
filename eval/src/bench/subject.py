"""What is measured: a loaded model with questions, or an architecture with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtc.adapter import Adapter, adapter_for
from vtc.eval.bench.accuracy import Prepared
from vtc.eval.bench.architectures import BuiltArch
from vtc.eval.data.suites import Suite
from vtc.eval.results.file import Run
from vtc.loading import Loaded


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        name: the model, as the reader knows it.
        adapter: of the loaded model.
        inputs: from a batch size, that many equal prompts to be timed.
        prepared: the questions; None: nothing is asked, only timed.
        about: what goes into the result file beside the name.
    """

    name: str
    adapter: Adapter
    inputs: Callable[[int], dict[str, Tensor]]
    prepared: Prepared | None
    about: Run


def with_questions(loaded: Loaded, suite: Suite, ask: bool = True, batch_size: int = 8) -> Subject:
    """A model and a suite; prompts that are timed are its first question, which is all that is used unless `ask`."""
    first = suite.items[0]

    def inputs(batch: int) -> dict[str, Any]:
        return loaded.batch([first.image] * batch, [first.question] * batch)

    prepared = Prepared(loaded, suite, batch_size) if ask else None
    return Subject(loaded.name, adapter_for(loaded.model), inputs, prepared, {"suite": suite.about if ask else None})


def without_weights(built: BuiltArch) -> Subject:
    """An architecture whose answers mean nothing: nothing is asked."""
    about: Run = {"suite": None, "arch": built.about()}
    return Subject(built.name, adapter_for(built.model), built.inputs, None, about)
