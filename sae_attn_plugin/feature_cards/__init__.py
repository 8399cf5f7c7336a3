"""A survey as a static site: an index, a card for each head, a card for each feature.

No server: the site opens from a folder. Its data are scripts, since a page that is a plain file may
load nothing else; a few hundred features share one.
"""

from __future__ import annotations

from sae_attn_plugin.feature_cards.build import cards

__all__ = ["cards"]
