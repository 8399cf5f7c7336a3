"""Prompts and tokens: the same string gives the same ids on every host."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_attn_plugin.errors import InputError


def need_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InputError(
            "the model has no tokenizer; pass tokenizer= to FeatureLens, or give token ids"
        )
    return tokenizer


def as_index(value: Any, name: str) -> int:
    """An integer of any library as an ``int``.

    Raises:
        InputError: naming what must be an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, got {value!r}") from None


def own_convention(tokenizer: Any) -> bool:
    """Whether a tokenizer, as its files define it, prepends BOS by itself.

    TransformerLens reloads tokenizers with ``add_bos_token=True``; what the files say is then read
    again from where they lie.
    """
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.init_kwargs.get("add_bos_token") is True:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        except (OSError, ValueError):
            raise InputError(
                "cannot tell whether this tokenizer prepends BOS by its own convention, since "
                "TransformerLens reloaded it with one; pass prepend_bos=True or False"
            ) from None
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_prompt(tokenizer: Any, prompt: str, prepend_bos: bool) -> list[int]:
    """Token ids of a prompt.

    Raises:
        InputError: an empty prompt, no BOS token where one is asked for, unknown words.
    """
    if not prompt:
        raise InputError("the prompt is empty; expected at least one token")
    tokenizer = need_tokenizer(tokenizer)
    ids = _ids(tokenizer, prompt)
    unknown = tokenizer.unk_token_id
    # Some tokenizers use one special token for everything; unknown words then cannot be told.
    if unknown is not None and unknown in ids and unknown != tokenizer.bos_token_id:
        words = [word for word in prompt.split() if unknown in _ids(tokenizer, " " + word)]
        raise InputError(
            f"the tokenizer does not know: {', '.join(map(repr, words)) or repr(prompt)}; use "
            "words of its vocabulary (tokenizer.get_vocab())"
        )
    if prepend_bos:
        bos = tokenizer.bos_token_id
        if bos is None:
            raise InputError("prepend_bos=True, but the tokenizer has no BOS token")
        if ids[:1] != [bos]:
            ids = [bos, *ids]
    if not ids:
        raise InputError(f"the prompt {prompt!r} has no tokens; expected at least one")
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{text!r} holds half a character, {text[error.start]!r}, which no tokenizer can read; "
            "expected text that UTF-8 can encode"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_ids(tokens: Any, d_vocab: int, n_ctx: int, device: torch.device) -> Int[Tensor, "b p"]:
    """Token ids as ``[batch, position]``.

    Raises:
        InputError: wrong shape or type, ids outside the vocabulary, longer than the context.
    """
    try:
        ids = torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError) as error:
        raise InputError(f"token ids must form a rectangle [batch, position]: {error}") from None
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool or not ids.numel():
        raise InputError(
            f"expected integer token ids [position] or [batch, position], got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        raise InputError(
            f"token ids must lie in 0..{d_vocab - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    if ids.shape[1] > n_ctx:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, but the model's context is {n_ctx}; shorten it"
        )
    return ids.long()


def token_string(tokenizer: Any, token: int) -> str:
    """How a token looks in running text, its leading space included; ``#id`` without tokenizer."""
    if tokenizer is None:
        return f"#{token}"
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"#{token}"
    if "\u2581" in piece:  # sentencepiece's space, which decode() drops at the start
        return piece.replace("\u2581", " ")
    return tokenizer.decode([token])


def token_strings(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    return tuple(token_string(tokenizer, int(token)) for token in tokens)


def single_token(tokenizer: Any, token: str | int, d_vocab: int) -> int:
    """The id of a token given as a one-token string or an id.

    Raises:
        InputError: a string that is several tokens or unknown, an id outside the vocabulary.
    """
    if not isinstance(token, str):
        try:
            token = operator.index(token)
        except TypeError:
            raise InputError(f"expected a token string or id, got {token!r}") from None
        if not 0 <= token < d_vocab:
            raise InputError(f"token id {token} is outside the vocabulary, 0..{d_vocab - 1}")
        return token
    tokenizer = need_tokenizer(tokenizer)
    ids = _ids(tokenizer, token)
    if len(ids) != 1:
        # Sentencepiece puts a space of its own before the text, so ask the vocabulary.
        exact = tokenizer.get_vocab().get(token.replace(" ", "\u2581"))
        if exact is not None:
            return exact
        pieces = [token_string(tokenizer, i) for i in ids]
        raise InputError(
            f"{token!r} is {len(ids)} tokens {pieces}; expected exactly one. Give one token, with "
            "its leading space where it has one, or a token id"
        )
    if ids[0] == tokenizer.unk_token_id and token != tokenizer.unk_token:
        raise InputError(f"the tokenizer does not know {token!r}")
    return ids[0]


def token_label(tokenizer: Any, token: int, d_vocab: int) -> str | int:
    """The string of a token if that names it exactly, else its id."""
    if tokenizer is None:
        return token
    text = token_string(tokenizer, token)
    try:
        return text if text and single_token(tokenizer, text, d_vocab) == token else token
    except InputError:
        return token


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids of BOS, EOS, PAD and the tokenizer's other special tokens, as sae_lens excludes them."""
    from sae_lens.util import get_special_token_ids

    return [int(token) for token in get_special_token_ids(need_tokenizer(tokenizer))]
