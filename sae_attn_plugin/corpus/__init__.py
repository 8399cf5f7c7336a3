"""Corpora: rows of tokens, and what features do over all of them."""
