"""The paper's studies, each a function of a lens or a survey that returns a :class:`Study`.

- ``quality``: how good the SAEs are.
- ``prefix``: long- and short-prefix induction heads.
- ``induction_feature``: features that say "X is next by induction", against the text.
- ``ioi_features``: which features carry the logit difference.
- ``ioi_positions``: what attention knows about the order of the names.
- ``ioi_circuit``: what the SAEs keep of the circuit, and paths from features to heads.
- ``qk_ioi``: pairs of features behind the scores of heads that look at names.
- ``heads``: every head by its features, from a corpus survey.
- ``families``: which features belong to which families, from a corpus survey.
- ``qk_variance``: how much of a score's variance a few pairs of features explain.
"""

from __future__ import annotations

from sae_attn_plugin.studies.families import families, family_scores
from sae_attn_plugin.studies.heads import heads
from sae_attn_plugin.studies.induction_feature import induction_feature
from sae_attn_plugin.studies.ioi_circuit import ioi_circuit
from sae_attn_plugin.studies.ioi_features import ioi_features
from sae_attn_plugin.studies.ioi_positions import ioi_positions
from sae_attn_plugin.studies.prefix import prefix
from sae_attn_plugin.studies.qk import QKVariance, qk_variance
from sae_attn_plugin.studies.qk_ioi import qk_ioi
from sae_attn_plugin.studies.quality import quality
from sae_attn_plugin.studies.result import Study, load_study

__all__ = [
    "QKVariance",
    "Study",
    "families",
    "family_scores",
    "heads",
    "induction_feature",
    "ioi_circuit",
    "ioi_features",
    "ioi_positions",
    "load_study",
    "prefix",
    "qk_ioi",
    "qk_variance",
    "quality",
]
