"""The paper's studies, each a function of a lens that returns a :class:`Study`.

``prefix``: long- and short-prefix induction heads.
"""

from __future__ import annotations

from sae_attn_plugin.studies.prefix import prefix
from sae_attn_plugin.studies.result import Study, load_study

__all__ = ["Study", "load_study", "prefix"]
