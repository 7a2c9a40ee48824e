"""The registry: which class runs the architecture that a config.json names.

A new family is one file beside this one, and here its import and its entry; docs/add-a-model.md has
the steps.
"""

from typing import Any

from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen2_moe import Qwen2MoeForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM

MODELS: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def find_model_class(content: dict[str, Any]) -> type[CausalLM]:
    """The class for the content of a config.json: by its architecture and model_type. It may
    name no architecture, or the one without a head, as embedding models do.

    Raises:
        ValueError: for an architecture that is not there; the message names it and those that are.
    """
    architectures, model_type = content.get("architectures") or [], content.get("model_type")
    for name, model in MODELS.items():
        without_head = name.replace("ForCausalLM", "Model")
        is_named = architectures in ([], [name], [without_head])
        if is_named and model.config_class.model_type == model_type:
            return model
    asked = architectures or model_type
    asked = asked[0] if isinstance(asked, list) else asked
    raise ValueError(f"architecture {asked!r} is not supported; nanovllm runs {', '.join(MODELS)}")
