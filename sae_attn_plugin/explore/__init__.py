"""The explorer: a local web page that asks a lens about any prompt."""
