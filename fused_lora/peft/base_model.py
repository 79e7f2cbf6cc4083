"""What ``adapter_config.json`` says of the base model, for PEFT's ``AutoPeftModelFor*``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from ..distributed.sharding import class_of


class _Task(NamedTuple):
    """One of PEFT's task types, and when PEFT can load an adapter of it.

    Attributes:
        auto_class: builds the base model.
        table: the classes that it makes, in transformers' ``modeling_auto``.
        attribute: that PEFT's class for the task reads from the base model, if any.
        heads: PEFT expects modules with these endings in the file.
        arguments: PEFT passes these to the base model's forward, besides the usual ones.
    """

    name: str
    auto_class: str
    table: str
    attribute: str = "forward"
    heads: tuple[str, ...] = ()
    arguments: frozenset[str] = frozenset()


_USUAL = frozenset({"input_ids", "attention_mask", "inputs_embeds"})
_GENERATES = "prepare_inputs_for_generation"
_CLASSIFIERS = ("classifier", "score")
_TASKS = (
    _Task("CAUSAL_LM", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", _GENERATES),
    _Task(
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        _GENERATES,
        arguments=frozenset({"decoder_input_ids"}),
    ),
    _Task(
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        heads=_CLASSIFIERS,
    ),
    _Task(
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        heads=_CLASSIFIERS,
    ),
    _Task(
        "QUESTION_ANS",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        heads=("qa_outputs",),
    ),
    _Task("FEATURE_EXTRACTION", "AutoModel", "MODEL_MAPPING_NAMES"),
)


def describe(
    model: nn.Module, module_names: Iterable[str], saved_modules: Collection[str] = ()
) -> dict:
    """The keys of ``adapter_config.json`` that describe the base model, as PEFT writes them.

    PEFT gives a model a task type or else its class (``auto_mapping``). The task selects a class of
    PEFT, which expects a classifier's head in the file and passes a text model's arguments. A model
    that would not load or run so gets its class: ``PeftModel`` and ``AutoPeftModel`` load it.

    Args:
        module_names: every module of the model.
        saved_modules: the modules that the file holds in full.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    kind = class_of(model)
    task = _task_type(model, kind, module_names, saved_modules)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "auto_mapping": None if task else mapping,
        "base_model_name_or_path": str(path) if path else None,
        "task_type": task,
    }


def _task_type(
    model: nn.Module, kind: type, module_names: Iterable[str], saved_modules: Collection[str]
) -> str | None:
    """The task whose Auto class makes ``model`` from its configuration; None if there is none."""
    tables = sys.modules.get("transformers.models.auto.modeling_auto")
    config = getattr(model, "config", None)
    if tables is None or not hasattr(config, "model_type"):
        return None
    remote = getattr(config, "auto_map", None) or {}  # of a model whose code is on the Hub
    for task in _TASKS:
        made = getattr(tables, task.table, {}).get(config.model_type, ())
        made = {made} if isinstance(made, str) else set(made)
        if task.auto_class in remote:
            made = {str(remote[task.auto_class]).rpartition(".")[2]}
        if kind.__name__ in made:
            takes = inspect.signature(kind.forward).parameters.keys()
            expected = {name for name in module_names if task.heads and name.endswith(task.heads)}
            loads = expected <= set(saved_modules) and hasattr(model, task.attribute)
            return task.name if loads and _USUAL | task.arguments <= takes else None
    return None
