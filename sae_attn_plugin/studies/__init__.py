"""The paper's studies, each a function of a lens that returns a :class:`Study`.

``prefix``: long- and short-prefix induction heads. ``induction_feature``: features that say "X is
next by induction", against the text.
"""

from __future__ import annotations

from sae_attn_plugin.studies.induction_feature import induction_feature
from sae_attn_plugin.studies.prefix import prefix
from sae_attn_plugin.studies.result import Study, load_study

__all__ = ["Study", "induction_feature", "load_study", "prefix"]
