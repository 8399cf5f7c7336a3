"""Attention-output sparse autoencoders for sae_lens: exact attribution graphs of their features.

Importing the package registers it with sae_lens: at once when sae_lens is imported already, else as
soon as it is. Public names load on first use, so that the import itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sae_attn_plugin import registration

# Not late as the others: nnsight puts a method `save` on every object, modules too.
from sae_attn_plugin.graphs.files import load, save

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sae_attn_plugin import demo, nodes, saes, studies, tasks, training
    from sae_attn_plugin.attribution.dfa import DFA
    from sae_attn_plugin.attribution.explain import EdgeExplanation
    from sae_attn_plugin.attribution.qk import QKAttribution
    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.backends.architectures import Architecture, register_architecture
    from sae_attn_plugin.backends.hooked import HookedModel, hooked
    from sae_attn_plugin.backends.loading import load_model
    from sae_attn_plugin.corpus.survey import Survey, load_survey, survey
    from sae_attn_plugin.dictionaries import Dictionary, head_attribution, load_saes
    from sae_attn_plugin.errors import (
        BackendError,
        FileError,
        InputError,
        SaeAttnError,
        UnsupportedError,
    )
    from sae_attn_plugin.evaluation import Evaluation, evaluate
    from sae_attn_plugin.feature_cards.build import cards
    from sae_attn_plugin.graphs.aligned import AlignedAttribution, AlignedContrast
    from sae_attn_plugin.graphs.compare import (
        GraphComparison,
        aggregate_graphs,
        compare_graphs,
        graph_difference,
        graphs_equal,
    )
    from sae_attn_plugin.graphs.contract import contract, suggest_supernodes
    from sae_attn_plugin.graphs.enrich import enrich
    from sae_attn_plugin.graphs.html import Page, graph_to_html, page, show
    from sae_attn_plugin.graphs.ledger import graph_ledger
    from sae_attn_plugin.graphs.paths import strongest_paths
    from sae_attn_plugin.graphs.picture import draw
    from sae_attn_plugin.graphs.structure import Cut, dominators, min_cut, subgraph_around
    from sae_attn_plugin.interventions.datasets import DatasetResult
    from sae_attn_plugin.interventions.edits import (
        AblateError,
        AblateFeature,
        AblateHead,
        AddToStream,
        Edit,
        Freeze,
        From,
        Mean,
        PatchEdge,
        PatchSite,
        ScaleFeature,
        SetFeature,
        Steer,
    )
    from sae_attn_plugin.interventions.faithfulness import Faithfulness, faithfulness
    from sae_attn_plugin.interventions.result import InterventionResult
    from sae_attn_plugin.interventions.validate import Agreement, Validation, validate
    from sae_attn_plugin.lens import FeatureLens, Run
    from sae_attn_plugin.nodes import Direction, Feature, HeadScore, Logit, LogitDiff, Node
    from sae_attn_plugin.pretrained import releases
    from sae_attn_plugin.registration import register, register_release
    from sae_attn_plugin.reproduction import Reproduction, reproduce
    from sae_attn_plugin.saes import AttentionSAE
    from sae_attn_plugin.splicing import splice
    from sae_attn_plugin.studies.qk import QKVariance, qk_variance

# public name -> where it lives
_PUBLIC = {
    "AblateError": "interventions.edits",
    "AblateFeature": "interventions.edits",
    "AblateHead": "interventions.edits",
    "AddToStream": "interventions.edits",
    "Agreement": "interventions.validate",
    "AttentionSAE": "saes",
    "AlignedAttribution": "graphs.aligned",
    "AlignedContrast": "graphs.aligned",
    "Architecture": "backends.architectures",
    "Attribution": "attribution.table",
    "BackendError": "errors",
    "DFA": "attribution.dfa",
    "DatasetResult": "interventions.datasets",
    "Dictionary": "dictionaries",
    "Direction": "nodes",
    "Edit": "interventions.edits",
    "Faithfulness": "interventions.faithfulness",
    "Feature": "nodes",
    "FeatureLens": "lens",
    "FileError": "errors",
    "Freeze": "interventions.edits",
    "From": "interventions.edits",
    "HeadScore": "nodes",
    "Evaluation": "evaluation",
    "HookedModel": "backends.hooked",
    "InputError": "errors",
    "InterventionResult": "interventions.result",
    "Logit": "nodes",
    "LogitDiff": "nodes",
    "Mean": "interventions.edits",
    "Node": "nodes",
    "Page": "graphs.html",
    "PatchEdge": "interventions.edits",
    "PatchSite": "interventions.edits",
    "EdgeExplanation": "attribution.explain",
    "QKAttribution": "attribution.qk",
    "QKVariance": "studies.qk",
    "Reproduction": "reproduction",
    "Run": "lens",
    "SaeAttnError": "errors",
    "ScaleFeature": "interventions.edits",
    "SetFeature": "interventions.edits",
    "Steer": "interventions.edits",
    "Survey": "corpus.survey",
    "UnsupportedError": "errors",
    "Validation": "interventions.validate",
    "Cut": "graphs.structure",
    "GraphComparison": "graphs.compare",
    "aggregate_graphs": "graphs.compare",
    "cards": "feature_cards.build",
    "compare_graphs": "graphs.compare",
    "contract": "graphs.contract",
    "dominators": "graphs.structure",
    "graph_difference": "graphs.compare",
    "graph_ledger": "graphs.ledger",
    "graphs_equal": "graphs.compare",
    "min_cut": "graphs.structure",
    "subgraph_around": "graphs.structure",
    "suggest_supernodes": "graphs.contract",
    "draw": "graphs.picture",
    "enrich": "graphs.enrich",
    "graph_to_html": "graphs.html",
    "evaluate": "evaluation",
    "faithfulness": "interventions.faithfulness",
    "head_attribution": "dictionaries",
    "hooked": "backends.hooked",
    "load_model": "backends.loading",
    "load_saes": "dictionaries",
    "load_survey": "corpus.survey",
    "page": "graphs.html",
    "qk_variance": "studies.qk",
    "register": "registration",
    "register_release": "registration",
    "releases": "pretrained",
    "reproduce": "reproduction",
    "register_architecture": "backends.architectures",
    "show": "graphs.html",
    "splice": "splicing",
    "strongest_paths": "graphs.paths",
    "survey": "corpus.survey",
    "validate": "interventions.validate",
}
_MODULES = ("demo", "nodes", "saes", "studies", "tasks", "training")

__all__ = [  # noqa: RUF022 - the front door first
    "FeatureLens",
    "Run",
    "Attribution",
    "DFA",
    "QKAttribution",
    "EdgeExplanation",
    "qk_variance",
    "QKVariance",
    "AlignedAttribution",
    "AlignedContrast",
    "Feature",
    "Logit",
    "LogitDiff",
    "Direction",
    "HeadScore",
    "Node",
    "Edit",
    "AblateFeature",
    "SetFeature",
    "ScaleFeature",
    "Steer",
    "AblateError",
    "AblateHead",
    "PatchSite",
    "PatchEdge",
    "AddToStream",
    "From",
    "Mean",
    "Freeze",
    "InterventionResult",
    "DatasetResult",
    "validate",
    "Validation",
    "Agreement",
    "faithfulness",
    "Faithfulness",
    "Dictionary",
    "head_attribution",
    "load_model",
    "load_saes",
    "hooked",
    "HookedModel",
    "evaluate",
    "Evaluation",
    "survey",
    "Survey",
    "load_survey",
    "save",
    "load",
    "draw",
    "show",
    "page",
    "Page",
    "enrich",
    "graph_to_html",
    "cards",
    "strongest_paths",
    "AttentionSAE",
    "splice",
    "releases",
    "min_cut",
    "Cut",
    "dominators",
    "subgraph_around",
    "contract",
    "suggest_supernodes",
    "graph_difference",
    "compare_graphs",
    "GraphComparison",
    "graphs_equal",
    "aggregate_graphs",
    "graph_ledger",
    "reproduce",
    "Reproduction",
    "register",
    "register_release",
    "Architecture",
    "register_architecture",
    "SaeAttnError",
    "InputError",
    "UnsupportedError",
    "BackendError",
    "FileError",
    "demo",
    "nodes",
    "saes",
    "studies",
    "tasks",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register_when_imported()
