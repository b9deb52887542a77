"""What lmms-eval finds through the entry point group `lmms_eval.models`; each of its runs imports this."""

from typing import Any

from vtc.eval.lmms.models import BASES, EMBEDDED, PREFIX


def manifests() -> list[Any]:
    """One manifest per wrapped model of the installed lmms-eval: `vtc_llava_hf`, `vtc_qwen2_5_vl`, ..."""
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from lmms_eval.models.registry_v2 import ModelManifest

    found = []
    for base in (*BASES, EMBEDDED):
        paths = {
            f"{kind}_class_path": f"vtc.eval.lmms.models.{kind}_{base}"
            for kind, known in (("simple", AVAILABLE_SIMPLE_MODELS), ("chat", AVAILABLE_CHAT_TEMPLATE_MODELS))
            if ("llava_hf" if base == EMBEDDED else base) in known
        }
        if paths:
            found.append(ModelManifest(model_id=PREFIX + base, **paths))
    return found
