"""The steps an intervention takes inside the forward pass: plain functions over plain tensors.

Each maker returns a function of the value at its site. A remote run ships these by their source, so
they hold tensors, numbers, dictionaries, norms and the dict ``seen`` of live values, and no model.
Sites are plain ``(name, layer)`` tuples, and nothing inside a maker is annotated.

``where`` is None (every position) or ``[prompt]`` positions, one for each prompt. What is held from
the clean run covers the clean run's positions; later ones, of generated tokens, stay live.
"""

# Functions that travel to a remote model by their source have no annotations.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def put(value: Tensor, where: Tensor | None, new: Any) -> Tensor:
    """``value`` with ``new`` at some positions.

    Args:
        value: ``[prompt, position, ...]``.
        new: with ``where``: ``[prompt, ...]`` or one for all; without: ``[prompt, position, ...]``
            (the first positions), or one for all.
    """
    value = value.clone()
    if isinstance(new, Tensor):
        new = new.to(value)
    if where is not None:
        value[torch.arange(len(value), device=value.device), where.to(value.device)] = new
    elif isinstance(new, Tensor) and new.ndim == value.ndim:
        value[:, : new.shape[1]] = new
    else:
        value[:] = new
    return value


def see(seen: dict[Any, Tensor], site: tuple[str, int]) -> Any:
    """Keep the live value for later steps."""

    def step(value):
        seen[site] = value
        return value

    return step


def see_first(seen: dict[Any, Tensor], site: Any) -> Any:
    """Keep the first value of a pass: edits of z are taken again where attention is held."""

    def step(value):
        seen.setdefault(site, value)
        return value

    return step


def hold(held: Tensor) -> Any:
    """The clean run's value instead."""

    def step(value):
        return put(value, None, held)

    return step


def replace(where: Tensor | None, new: Any, head: int | None = None) -> Any:
    """Another value at some positions: of one head, or of all that stands there."""

    def step(value):
        if head is None:
            return put(value, where, new)
        value = value.clone()
        value[:, :, head] = put(value[:, :, head], where, new)
        return value

    return step


def add(vector: Tensor, where: Tensor | None) -> Any:
    """Add a vector at some positions."""

    def step(value):
        change = put(torch.zeros_like(value), where, vector)
        return value + change

    return step


def mix(seen: dict[Any, Tensor], v: tuple[str, int], pattern: Tensor) -> Any:
    """z from a held pattern and the live values."""

    def step(z):
        n = pattern.shape[-1]
        values = seen[v].to(z)[:, :n]
        values = values.repeat_interleave(pattern.shape[1] // values.shape[-2], dim=-2)
        return put(z, None, torch.einsum("bhqk,bkhe->bqhe", pattern.to(z), values))

    return step


def stream(seen: dict[Any, Tensor], sites: list[tuple[str, int]]) -> Any:
    """The live sum of what stands at some sites."""

    def live():
        total = seen[sites[0]]
        for site in sites[1:]:
            total = total + seen[site].to(total)
        return total

    return live


def projected(seen: dict[Any, Tensor], z: tuple[str, int], W_O: Tensor, b_O: Tensor) -> Any:
    """The live z through the output projection: what a post-norm reads."""

    def live():
        flat = seen[z].to(W_O).flatten(-2)
        return flat @ W_O.flatten(0, 1) + b_O

    return live


def normalised(live: Any, norm: Any, scale: Tensor) -> Any:
    """A norm of ``live()`` with a held scale, computed in the dtype of the scale."""

    def step(value):
        x = live()[:, : scale.shape[1]].to(value.device, scale.dtype)
        return put(value, None, norm_of(x, norm, scale))

    return step


def norm_of(x: Tensor, norm: Any, scale: Tensor | None) -> Tensor:
    """``x`` normalised; positions that ``scale`` ``[prompt, position, 1]`` covers have that one."""
    norm = norm.to(x.dtype, x.device)
    return norm.apply(x, whole_scale(x, norm, scale))


def whole_scale(x: Tensor, norm: Any, scale: Tensor | None) -> Tensor:
    """The held scale where there is one, else that of ``x``."""
    own = norm.scale(x)
    return own if scale is None else put(own, None, scale)


def held_attention(
    seen: dict[Any, Tensor],
    layer: int,
    clean: Tensor,
    z: Tensor,
    steps: list[Any],
    W_O: Tensor,
    norm: Any,
    scale: Any,
) -> Any:
    """What attention added in the clean run, and what edits of z change in it.

    Args:
        clean, z: of the clean run. steps: the edits of z.
        norm, scale: the post-norm and its scale in the clean run, None where there is none.
        seen: where it has the live z, it is given the held one as ``("held_z", layer)``.
    """

    def step(value):
        edited = z.to(value.device)
        for edit in steps:
            edited = edit(edited)
        if ("z", layer) in seen:
            seen["held_z", layer] = put(seen["z", layer], None, edited)
        change = (edited - z.to(edited)).flatten(-2).to(W_O) @ W_O.flatten(0, 1)
        if norm is not None:
            change = norm.to(change.dtype, change.device).linear(change, scale.to(change))
        return put(value, None, clean.to(value) + change.to(value))

    return step


def set_features(dictionary: Any, edits: list[Any], dtype: torch.dtype, read: Any = None) -> Any:
    """What a dictionary writes with features set, its error term kept unless that is edited.

    Args:
        dictionary: of the layer.
        edits: ``(what, feature, where, amount)``, in order; ``what`` is ``"set"``, ``"scale"``,
            ``"add"`` or ``"error"``; ``amount`` a number, or as ``new`` of :func:`put`.
        read: what a transcoder reads; an SAE reads what it writes.
    """

    def step(z):
        work = z.to(dtype, copy=True)
        x = work if read is None else read().to(dtype)
        live, scale, error = read_features(dictionary, x, edits, work)
        wanted, wanted_error = wanted_features(live, error, edits)
        for feature, at in live.items():
            row = dictionary.decoder(torch.tensor([feature], device=z.device), dtype)[0]
            delta = (wanted[feature] - at) * scale
            work = work + delta.reshape(*delta.shape, *[1] * row.ndim) * row
        if error is not None:
            work = work + (wanted_error - error)
        return work.to(z.dtype)

    return step


def wanted_features(live: Any, error: Any, edits: list[Any]) -> tuple[Any, Any]:
    """Activations and error after some edits, from what they are without."""
    wanted = dict(live)
    for what, feature, where, amount in edits:
        if what == "error":
            error = put(error, where, amount)
        elif what == "set":
            wanted[feature] = put(wanted[feature], where, amount)
        else:
            at = wanted[feature]
            changed = at * amount if what == "scale" else at + amount
            wanted[feature] = changed if where is None else pick_into(at, where, changed)
    return wanted, error


def of_prompt(edit: Any, index: int) -> Any:
    """An edit of features for several prompts as it is for one of them."""
    what, feature, where, amount = edit
    each = isinstance(amount, Tensor) and what != "error" and amount.ndim > 0
    part = slice(index, index + 1)
    return what, feature, None if where is None else where[part], amount[part] if each else amount


def active_features(dictionary: Any, x: Tensor, edits: list[Any]) -> dict[tuple[int, int], float]:
    """Activation by ``(position, feature)`` of the active features of one prompt, after edits.

    Args:
        x: ``[1, position, ...]``, what the dictionary reads.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    encoded = dictionary.encode(work[0])
    columns = (encoded.position.tolist(), encoded.feature.tolist(), encoded.activation.tolist())
    found = {(position, feature): value for position, feature, value in zip(*columns, strict=True)}
    of_features = [edit for edit in edits if edit[0] != "error"]
    if of_features:
        live, _, _ = read_features(dictionary, work, of_features)
        for feature, at in wanted_features(live, None, of_features)[0].items():
            found |= {(position, feature): value for position, value in enumerate(at[0].tolist())}
    return found


def pick_into(value: Tensor, where: Tensor, changed: Tensor) -> Tensor:
    """``value`` with ``changed`` at one position of each prompt."""
    every = torch.arange(len(value), device=value.device)
    return put(value, where, changed[every, where.to(value.device)])


def read_features(
    dictionary: Any, x: Tensor, edits: list[Any], value: Tensor | None = None
) -> tuple[Any, Tensor, Any]:
    """Live activations ``[prompt, position]`` of the features that edits name, the dictionary's
    output scale ``[prompt, position]``, and its error ``[prompt, position, ...]`` if one needs it.

    Args:
        x: what the dictionary reads; value: what it reconstructs (None: the same).
    """
    features = {feature for what, feature, _, _ in edits if what != "error"}
    live = {feature: x.new_zeros(x.shape[:2]) for feature in sorted(features)}
    scale, value = x.new_ones(x.shape[:2]), x if value is None else value
    error = torch.zeros_like(value) if any(what == "error" for what, *_ in edits) else None
    for number, prompt in enumerate(x):
        encoded = dictionary.encode(prompt)
        scale[number] = dictionary.output_scale(encoded.scale)[:, 0]
        for feature, at in live.items():
            hit = encoded.feature == feature
            at[number, encoded.position[hit]] = encoded.activation[hit]
        if error is not None:
            known, skip = dictionary.decode(encoded), dictionary.skip(prompt)
            error[number] = value[number] - (known if skip is None else known + skip)
    return live, scale, error


def chain(steps: list[Any]) -> Any:
    """One step after the other."""

    def run(value):
        for step in steps:
            value = step(value)
        return value

    return run


# -- edges ---------------------------------------------------------------------------------------


def mlp_reader(live: Any, how: str, norm: Any, scale: Tensor | None, dtype: Any) -> Any:
    """What a transcoder reads, from the stream in front of the MLP and what is added to that.

    Args:
        how: ``Dictionary.reads``. scale: of the norm, where it is held.
    """

    def read(moved=None):
        x = live().to(dtype)
        if moved is not None:
            x = x + moved.to(x)
        if how == "mlp_stream":
            return x
        own = norm.to(x.dtype, x.device)
        held = whole_scale(x, own, scale)
        return own.centre(x) / held if how == "mlp_normalised" else own.apply(x, held)

    return read


def with_held(live: Any, held: Tensor) -> Any:
    """A live value with the clean one over the positions of the clean run."""

    def value():
        return put(live(), None, held)

    return value


def feature_change(read: Any, dictionary: Any, feature: int) -> Any:
    """A maker of changes of what a feature writes, in the space of its dictionary's output.

    Args:
        read: gives what the dictionary reads.
    """

    def change(where, new):
        x = read()
        live, scale, _ = read_features(dictionary, x, [("set", feature, None, 0.0)])
        at = live[feature]
        row = dictionary.decoder(torch.tensor([feature], device=x.device), x.dtype)[0]
        delta = (put(at, where, 0.0 if new is None else new) - at) * scale
        return delta.reshape(*delta.shape, *[1] * row.ndim) * row

    return change


def error_change(read: Any, value: Any, dictionary: Any) -> Any:
    """The same of a dictionary's error; ``value`` gives what the dictionary reconstructs."""

    def change(where, new):
        _, _, error = read_features(dictionary, read(), [("error", -1, None, 0.0)], value())
        return put(error, where, 0.0 if new is None else new) - error

    return change


def bias_change(read: Any, dictionary: Any, skip: bool = False) -> Any:
    """The same of what a dictionary writes without any feature, or of its skip connection."""

    def change(where, new):  # noqa: ARG001 - it is only taken away
        x = read()
        parts = []
        for prompt in x:
            encoded = dictionary.encode(prompt)
            one = dictionary.skip(prompt) if skip else dictionary.bias(encoded.scale, encoded.mean)
            parts.append(one)
        whole = torch.stack(parts)
        return put(whole, where, 0.0) - whole

    return change


def no_change(read: Any) -> Any:
    """Nothing changes in what ``read`` gives."""

    def change(where, new):  # noqa: ARG001
        return torch.zeros_like(read())

    return change


def live_value(seen: dict[Any, Tensor], site: tuple[str, int], dtype: Any) -> Any:
    """What stands at a site."""

    def value():
        return seen[site].to(dtype)

    return value


def through_norm(change: Any, live: Any, norm: Any, scale: Tensor | None, with_bias: bool) -> Any:
    """A change in front of a post-norm as a change behind it; the norm keeps its live scale.

    Args:
        live: gives what the norm reads; norm: None where there is none; scale: where it is held.
        with_bias: the change takes away the norm's bias too.
    """

    def out(where, new):
        moved = change(where, new)
        if norm is None:
            return moved
        at = norm.to(moved.dtype, moved.device)
        moved = at.linear(moved, whole_scale(live().to(moved), at, scale))
        if with_bias and at.bias is not None:
            moved = moved + put(torch.zeros_like(moved), where, -at.bias)
        return moved

    return out


def head_change(seen: dict[Any, Tensor], z: tuple[str, int], head: int, dtype: Any) -> Any:
    """The same of a head's z."""

    def change(where, new):
        live = seen[z].to(dtype)
        out = torch.zeros_like(live)
        at = live[:, :, head]
        out[:, :, head] = put(at, where, 0.0 if new is None else new) - at
        return out

    return change


def site_change(seen: dict[Any, Tensor], site: tuple[str, int], like: Any, dtype: Any) -> Any:
    """The same of what stands at a site; ``like`` is a site with one row for every prompt."""

    def change(where, new):
        live = seen[site].to(dtype)
        live = live.expand(len(seen[like]), *live.shape[1:])
        return put(live, where, 0.0 if new is None else new) - live

    return change


def through_output(change: Any, W_O: Tensor, b_O: Tensor, with_bias: bool) -> Any:
    """A change of z as a change of the output projection.

    Args:
        with_bias: the change takes away the projection's bias too.
    """

    def out(where, new):
        moved = change(where, new)
        moved = moved.flatten(-2) @ W_O.flatten(0, 1).to(moved)
        return moved + put(torch.zeros_like(moved), where, -b_O) if with_bias else moved

    return out


def total(changes: list[Any]) -> Any:
    """The sum of changes of the residual stream: ``(change, where, new)`` each."""

    def live():
        result = None
        for change, where, new in changes:
            one = change(where, new)
            result = one if result is None else result + one
        return result

    return live


def normed_change(live: Any, before: list[Any], changes: list[Any], norm: Any, scale: Any) -> Any:
    """What changes of the stream do behind a norm.

    Args:
        live: the stream. before: changes that are in it already. changes: those asked for.
        scale: the norm's, where it is held.
    """

    def change():
        moved = total(changes)()
        x = live().to(moved)
        if before:
            x = x + total(before)()
        return norm_of(x + moved, norm, scale) - norm_of(x, norm, scale)

    return change


def change_values(change: Any, W_V: Tensor, groups: list[int]) -> Any:
    """Values of some key/value groups after a change of their input."""

    def step(v):
        moved = change()
        by_group = torch.einsum("bpd,kde->bpke", moved, W_V[groups].to(moved))
        v = v.clone()
        v[:, :, groups] += by_group.to(v)
        return v

    return step


def visible(pattern: Tensor) -> Tensor:
    """``[prompt, query, key]``: the keys that a query may look at. A weight that rounds to zero in
    every head is no mask: masks take away whole ends of the text, earlier ones from later queries.

    Args:
        pattern: ``[prompt, head, query, key]``.
    """
    seen = (pattern > 0).any(1)
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    first = torch.where(seen, keys, pattern.shape[-1]).amin(-1)
    first = first.flip(-1).cummin(-1).values.flip(-1)
    return (keys >= first[..., None]) & (keys <= keys[:, None])


def change_patterns(
    seen: dict[Any, Tensor],
    live: Any,
    norm: Any,
    scale: Tensor | None,
    weights: Any,
    held: Any,
    visible: Tensor,
    v: tuple[str, int],
    changes: list[Any],
    dtype: Any,
) -> Any:
    """z of some heads after changes of what their queries and keys read; ``seen`` is given what is
    new: ``("query", layer, head)``, ``("key", layer, head)`` and ``("pattern", layer, head)``.

    Args:
        live: gives the stream; norm: what stands in front of attention; scale: its own, where held.
        weights: of the layer's scores; held: the scales of its query and key norms, where held.
        visible: ``[prompt, query, key]``.
        v: the site of the live values.
        changes: ``(head, query, key, value)`` each: what gives the changes of the stream that these
            inputs of the head see, or None; of the value, those that are not in ``v``, through the
            norm, with the W_V of the head.
    """

    def project(x, moved, side):
        make = weights.queries if side == 0 else weights.keys
        x = x if moved is None else x + moved().to(x)
        x = norm_of(x, norm, scale)
        made, own = make(x)
        return made if held[side] is None else make(x, put(own, None, held[side]))[0]

    def step(z):
        n = visible.shape[-1]
        x, known, z = live().to(dtype)[:, :n], {}, z.clone()

        def side_of(moved, side):
            if (id(moved), side) not in known:
                known[id(moved), side] = project(x, moved, side)
            return known[id(moved), side]

        for head, query, key, value in changes:
            values = seen[v].to(dtype)[:, :n]
            group = head // (z.shape[2] // values.shape[2])
            values = values[:, :, group]
            if value is not None:
                change, W_V = value
                values = values + change()[:, :n].to(values) @ W_V.to(values)
            before, after = (
                (side_of(of_query, 0)[:, :, head], side_of(of_key, 1)[:, :, group])
                for of_query, of_key in ((None, None), (query, key))
            )
            seen["query", v[1], head], seen["key", v[1], head] = after
            before, after = (
                weights.pattern(q, k, head, visible.to(values.device)) for q, k in (before, after)
            )
            z[:, :n, head] += ((after - before) @ values).to(z)
            seen["pattern", v[1], head] = after
        return z

    return step


def change_head(change: Any, W_V: Tensor, pattern: Tensor, head: int) -> Any:
    """z of one head of a key/value group after a change of its values' input alone.

    Args:
        W_V: ``[d_model, d_head]`` of the group; pattern: ``[prompt, head, query, key]``.
    """

    def step(z):
        moved = change()[:, : z.shape[1]]
        values = moved @ W_V.to(moved)
        z = z.clone()
        z[:, :, head] += mixed(pattern[:, head], values).to(z)
        return z

    return step


def mixed(pattern: Tensor, values: Tensor) -> Tensor:
    """``pattern @ values``; positions that the pattern does not cover stay zero."""
    n = min(pattern.shape[-1], values.shape[1])
    held = pattern[..., :n, :n].to(values)
    out = torch.zeros_like(values)
    out[:, :n] = torch.einsum("bqk,bke->bqe", held, values[:, :n])
    return out


def change_reader(
    change: Any,
    W_V: Tensor,
    pattern: Tensor,
    dictionary: Any,
    feature: int,
    where: Tensor | None,
    dtype: torch.dtype,
    project: Any = None,
) -> Any:
    """z, or what attention adds, after one feature read it with a change of the values' input.

    Only the activation of the feature changes, as it would if all of z had moved; every other
    feature and the error stay.

    Args:
        project: takes a change of z to what the dictionary reads; None where that is z.
    """

    def step(value):
        work = value.to(dtype)
        n = min(pattern.shape[-1], value.shape[1])
        moved = change()[:, :n].to(dtype)
        values = torch.einsum("bpd,kde->bpke", moved, W_V.to(moved))
        values = values.repeat_interleave(pattern.shape[1] // values.shape[-2], dim=-2)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern[..., :n, :n].to(work), values)
        shifted = work.clone()
        shifted[:, :n] += z if project is None else project(z)
        return (work + one_feature(dictionary, feature, where, work, shifted)).to(value.dtype)

    return step


def projector(W_O: Tensor, live: Any, norm: Any, scale: Tensor | None) -> Any:
    """Takes changes of z to what attention adds; the post-norm keeps its live scale."""

    def project(z):
        out = z.flatten(-2) @ W_O.flatten(0, 1).to(z)
        if norm is None:
            return out
        own = norm.to(out.dtype, out.device)
        return own.linear(out, whole_scale(live().to(out), own, scale)[:, : out.shape[1]])

    return project


def change_mlp_feature(
    change: Any, read: Any, dictionary: Any, feature: int, where: Tensor | None, dtype: Any
) -> Any:
    """What an MLP writes after one transcoder feature read the stream with a change."""

    def step(value):
        work = value.to(dtype)
        moved = one_feature(dictionary, feature, where, read(), read(change()))
        return (work + moved.to(work)).to(value.dtype)

    return step


def held_raw(clean: Tensor, steps: list[Any], norm: Any, scale: Tensor) -> Any:
    """A held MLP output, and what edits in front of its post-norm change in it."""

    def step(value):
        edited = clean
        for edit in steps:
            edited = edit(edited)
        change = norm.to(edited.dtype, edited.device).linear(edited - clean, scale.to(edited))
        return put(value, None, value[:, : clean.shape[1]] + change.to(value))

    return step


def one_feature(
    dictionary: Any, feature: int, where: Tensor | None, was: Tensor, now: Tensor
) -> Tensor:
    """What a dictionary writes more if one feature reads ``now`` where the others read ``was``."""
    only = [("set", feature, None, 0.0)]
    before, scale, _ = read_features(dictionary, was, only)
    after, _, _ = read_features(dictionary, now, only)
    change = after[feature] - before[feature]
    if where is not None:
        change = pick_into(torch.zeros_like(change), where, change)
    row = dictionary.decoder(torch.tensor([feature], device=was.device), was.dtype)[0]
    # The output scale is that of the run: only the activation is another.
    return (change * scale).reshape(*change.shape, *[1] * row.ndim) * row


def add_change(change: Any) -> Any:
    """Add a change to what stands at a site."""

    def step(value):
        return value + change().to(value)

    return step
