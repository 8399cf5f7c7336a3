"""What runs inside a trace: plain functions on plain data, so that it can also run elsewhere.

A remote run ships these functions by their source to a machine that does not have this package.
They may use torch, builtins and their arguments, and nothing else: no class of this package, no
annotation that must be evaluated inside a function.
"""

# Functions that travel to a remote model by their source have no annotations.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def submodule(root: Any, path: str) -> Any:
    """The module or envoy at a dotted path."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root


def select_values(out: Tensor, layout: str, n_kv: int, d_head: int) -> Tensor:
    """``[..., n_kv, d_head]`` from the output of the module that computes the values."""
    if layout == "interleaved":
        return out.unflatten(-1, (n_kv, 3 * d_head))[..., 2 * d_head :]
    return out[..., -n_kv * d_head :].unflatten(-1, (n_kv, d_head))


def replace_values(out: Tensor, layout: str, values: Tensor) -> Tensor:
    """The output of the module that computes the values, with other values in it."""
    if layout == "interleaved":
        d_head = values.shape[-1]
        rest = out.unflatten(-1, (-1, 3 * d_head))[..., : 2 * d_head]
        return torch.cat([rest, values], dim=-1).flatten(-2)
    flat = values.flatten(-2)
    return torch.cat([out[..., : out.shape[-1] - flat.shape[-1]], flat], dim=-1)


def walk(
    root: Any,
    row: dict[str, Any],
    shape: tuple[int, int, int],
    layers: list[int],
    reads: set[tuple[str, int]],
    edits: dict[tuple[str, int], Any],
    elsewhere: bool,
    logits: bool = True,
) -> dict[tuple[str, int], Tensor]:
    """Visit sites in the order of execution, edit some, and return the values of others.

    Args:
        root: the model's envoy; row: the architecture's paths and layout.
        shape: ``(n_heads, n_kv, d_head)``; layers: those to visit.
        reads, edits: by ``(name, layer)``.
        elsewhere: the trace runs on another machine, whose model is as its owner loaded it: for
            this forward pass switch it to eager attention, since other kinds return no attention
            weights, and gradients off.
    """
    n_heads, n_kv, d_head = shape
    found = {}
    config = root._module.config
    before, gradients = config._attn_implementation, torch.is_grad_enabled()
    if elsewhere:
        config._attn_implementation = "eager"
        torch.set_grad_enabled(False)

    def visit(name, layer, envoy, side, take, put):
        site = (name, layer)
        if site not in reads and site not in edits:
            return
        whole = getattr(envoy, side)
        value = take(whole)
        if site in edits:
            value = edits[site](value)
            setattr(envoy, side, put(whole, value))
        if site in reads:
            found[site] = value

    def same(whole):
        return whole

    def new(whole, value):  # noqa: ARG001
        return value

    def plain(name, layer, envoy, side):
        visit(name, layer, envoy, side, same, new)

    def take_values(whole):
        return select_values(whole, row["layout"], n_kv, d_head)

    def put_values(whole, value):
        return replace_values(whole, row["layout"], value)

    def take_heads(whole):
        return whole.unflatten(-1, (n_heads, d_head))

    def put_heads(whole, value):  # noqa: ARG001
        return value.flatten(-2)

    try:
        plain("embed", -1, submodule(root, row["embed"]), "output")
        if row["pos_embed"] is not None:
            plain("pos_embed", -1, submodule(root, row["pos_embed"]), "output")
        blocks = submodule(root, row["blocks"])
        for layer in layers:
            block = blocks[layer]
            at = {
                key: submodule(block, row[key])
                for key in (
                    *("norm", "values", "out_projection", "attention", "post_norm"),
                    *("mlp", "mlp_post_norm"),
                )
                if row[key] is not None
            }
            projection, mlp = at["out_projection"], at["mlp"]
            plain("resid_pre", layer, block, "input")
            if "norm" in at:
                plain("attn_in", layer, at["norm"], "output")
            visit("v", layer, at["values"], "output", take_values, put_values)
            visit("z", layer, projection, "input", take_heads, put_heads)
            if "post_norm" not in at:
                plain("attn_out", layer, projection, "output")
            if ("pattern", layer) in reads:
                found[("pattern", layer)] = at["attention"].output[1]
            if "post_norm" in at:
                plain("attn_out", layer, at["post_norm"], "output")
            plain("mlp_in", layer, mlp, "input")
            if "mlp_post_norm" in at:
                plain("mlp_raw", layer, mlp, "output")
                plain("mlp_out", layer, at["mlp_post_norm"], "output")
            else:
                plain("mlp_out", layer, mlp, "output")
        plain("resid_final", -1, submodule(root, row["final_norm"]), "input")
        plain("unembed_in", -1, submodule(root, row["final_norm"]), "output")
        if logits:
            found[("logits", -1)] = root.output.logits
    finally:
        if elsewhere:
            config._attn_implementation = before
            torch.set_grad_enabled(gradients)
    return found


def fetch(root: Any, paths: list[str]) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Weight and bias of modules, from wherever the model is, and whether it is in training."""
    found = {}
    for path in paths:
        module = submodule(root, path)._module
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        found[path] = (weight.clone(), None if bias is None else bias.detach().clone())
    return found, root._module.training
