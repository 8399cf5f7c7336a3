"""An independent reading of models with dictionaries on attention and MLPs: hooks and autograd.

Nothing of the package is used here. A Hugging Face model runs in float64 with attention weights and
norm scales cut out of the gradient and activation ratios held. In the *direct* run every writer is
a constant times a leaf that stands at 1, so a derivative with respect to a leaf is a direct edge.
In the *live* run features answer to what they read, so a derivative with respect to a probe is the
gradient at a place through all paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from architecture_models import _Frozen
from torch import Tensor

# the norm before attention, the final norm
_NORMS = {
    "gpt2": ("ln_1", "transformer.ln_f"),
    "gpt_neox": ("input_layernorm", "gpt_neox.final_layer_norm"),
    "llama": ("input_layernorm", "model.norm"),
    "gemma2": ("input_layernorm", "model.norm"),
}
# blocks, out projection, where attention is added, norm before the MLP, where the MLP is added,
# activation (from the MLP)
_PLACES = {
    "gpt2": ("transformer.h", "attn.c_proj", "attn.c_proj", "ln_2", "mlp", "act"),
    "gpt_neox": (
        *("gpt_neox.layers", "attention.dense", "attention.dense"),
        *("post_attention_layernorm", "mlp", "act"),
    ),
    "llama": (
        *("model.layers", "self_attn.o_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp", "act_fn"),
    ),
    "gemma2": (
        *("model.layers", "self_attn.o_proj", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm", "act_fn"),
    ),
}


class FullOracle:
    """Direct edges and gradients at places, by autograd.

    Args:
        model: float64, eager, of a family in the table above.
        saes, transcoders: sae_lens objects by layer; transcoders may be SAEs on hook_mlp_out.
        tokens: one prompt.
        residual: SAEs by ``(kind, layer)`` that split what readers take from the stream, at the
            source positions ``at``; recurse: their features answer to the stream.
    """

    def __init__(
        self,
        model: Any,
        saes: Mapping[int, Any],
        transcoders: Mapping[int, Any],
        tokens: list[int],
        residual: Mapping[tuple[str, int], Any] | None = None,
        at: Sequence[int] = (),
        recurse: bool = False,
    ) -> None:
        self.residual, self.at, self.recurse = residual or {}, list(at), recurse
        self.model, self.saes, self.transcoders = model, saes, transcoders
        self.tokens, self.n = tokens, len(tokens)
        self.kind = model.config.model_type
        self.n_heads = model.config.num_attention_heads
        self.blocks: Any = model.get_submodule(_PLACES[self.kind][0])
        self.n_layers = len(self.blocks)
        head = model.get_output_embeddings()
        seen: list[Tensor] = []  # before any soft-cap
        handle = head.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
        handle.remove()
        self.plain = seen[0]
        self.direct = self._run(live=False)
        self.live = self._run(live=True)

    def _module(self, layer: int, place: int) -> Any:
        return self.blocks[layer].get_submodule(_PLACES[self.kind][place])

    # -- dictionaries ----------------------------------------------------------------------------

    def pre(self, sae: Any, x: Tensor) -> Tensor:
        """Pre-activations of a live input, with the SAE's own normalisation scale held."""
        p = {name: t.detach() for name, t in sae.state_dict().items()}
        if sae.cfg.normalize_activations == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + 1e-5).detach()
        if sae.cfg.apply_b_dec_to_input:
            x = x - p["b_dec"]
        if sae.cfg.architecture() == "gated":
            return x @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
        pre = x @ p["W_enc"] + p["b_enc"]
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            pre = pre * p["W_dec"].norm(dim=-1)
        return pre

    def _acts(self, sae: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.detach()
            if sae.cfg.reshape_activations == "hook_z":
                x = x.unflatten(-1, (self.n_heads, -1))
            return sae.encode(x)

    def _split(self, run: Any, kind: str, layer: int, sae: Any, x: Tensor, out: Tensor) -> Tensor:
        """``out`` from features, bias, error (and skip) of a dictionary that reads ``x``."""
        acts, fixed = self._acts(sae, x), out.detach()
        run["acts"][kind, layer] = acts
        transcoder = "transcoder" in sae.cfg.architecture()
        scale, mean = torch.ones(self.n, 1).double(), torch.zeros(self.n, 1).double()
        if sae.cfg.normalize_activations == "layer_norm" and not transcoder:
            mean = x.detach().mean(-1, keepdim=True)
            scale = x.detach().std(-1, keepdim=True)
        W_dec = sae.W_dec.detach()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
        bias = sae.b_dec.detach() * scale + mean
        skip = None
        if hasattr(sae, "W_skip"):
            skip = x @ sae.W_skip.detach().T
        error = fixed - acts @ W_dec * scale - bias
        if skip is not None:
            error = error - skip.detach()
        if run["live"]:
            pre = self.pre(sae, x)
            acts = torch.where(acts != 0, pre * (acts / pre).detach(), 0)
            rebuilt = acts @ W_dec * scale + bias + error
            return rebuilt if skip is None else rebuilt + skip
        rebuilt = (
            (acts * self._leaf(run, f"{kind}:{layer}", acts.shape[1])) @ W_dec * scale
            + bias * self._leaf(run, f"{kind}_bias:{layer}")[:, None]
            + error * self._leaf(run, f"{kind}_err:{layer}")[:, None]
        )
        if skip is not None:
            run["skip", layer] = skip
            rebuilt = rebuilt + skip.detach() * self._leaf(run, f"tc_skip:{layer}")[:, None]
        return rebuilt

    # -- the run ---------------------------------------------------------------------------------

    def _leaf(self, run: Any, name: str, *shape: int) -> Tensor:
        leaf = torch.ones(self.n, *shape, dtype=torch.float64, requires_grad=True)
        run["leaves"][name] = leaf
        return leaf

    def _run(self, live: bool) -> dict[Any, Any]:
        run: dict[Any, Any] = {"live": live, "leaves": {}, "acts": {}, "probes": {}}
        embeddings = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        handles = []
        for name, module in zip(("embed", "pos"), embeddings, strict=False):
            handles.append(module.register_forward_hook(self._embedding(run, name)))
        for layer in range(self.n_layers):
            projection, added = self._module(layer, 1), self._module(layer, 2)
            mlp = self.blocks[layer].mlp
            handles += [
                projection.register_forward_pre_hook(self._z(run, layer)),
                projection.register_forward_hook(self._bias(run, layer)),
                added.register_forward_hook(self._attention(run, layer)),
                self._module(layer, 3).register_forward_hook(self._keep_stream(run, layer)),
                mlp.register_forward_pre_hook(self._keep_input(run, layer)),
                mlp.get_submodule(_PLACES[self.kind][5]).register_forward_hook(self._held),
                mlp.register_forward_hook(self._raw(run, layer)),
                self._module(layer, 4).register_forward_hook(self._mlp(run, layer)),
            ]
        for (kind, layer), sae in self.residual.items():
            for norm in self._readers_of(kind, layer):
                split = self._stream(run, kind, layer, sae)
                handles.append(norm.register_forward_pre_hook(split))
        handles.append(
            self.model.get_output_embeddings().register_forward_hook(
                lambda _m, _a, out: run.update(logits=out[0])
            )
        )
        try:
            with _Frozen(), torch.enable_grad():
                self.model(torch.tensor([self.tokens]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return run

    def _readers_of(self, kind: str, layer: int) -> list[Any]:
        """The norms that read the stream at a place."""
        own, final = _NORMS[self.kind]
        if kind == "resid_mid":
            return [self._module(layer, 3)]
        if layer == self.n_layers:
            return [self.model.get_submodule(final)]
        parallel = [self._module(layer, 3)] if self.kind == "gpt_neox" else []
        return [self.blocks[layer].get_submodule(own), *parallel]

    def _stream(self, run: Any, kind: str, layer: int, sae: Any) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if (kind, layer) not in run:
                stream = run[kind, layer] = args[0][0]
                source = stream if self.recurse else stream.detach()
                split = self._split(run, kind, layer, sae, source, stream)
                chosen = torch.zeros(self.n, 1, dtype=torch.bool)
                chosen[self.at] = True
                run["split", kind, layer] = torch.where(chosen, split, stream)
            return (run["split", kind, layer][None], *args[1:])

        return hook

    def _embedding(self, run: Any, name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
            fixed = out.detach().reshape(self.n, -1)
            return (fixed if run["live"] else fixed * self._leaf(run, name)[:, None])[None]

        return hook

    def _z(self, run: Any, layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z, sae = args[0][0], self.saes.get(layer)
            run["z", layer] = z
            if sae is not None and sae.cfg.metadata.hook_name.endswith("hook_z"):
                z = self._split(run, "attn", layer, sae, z, z)
            elif not run["live"]:
                z = z.detach()
                if sae is None:
                    by_head = z.unflatten(-1, (self.n_heads, -1))
                    leaf = self._leaf(run, f"head:{layer}.", self.n_heads)
                    z = (by_head * leaf[..., None]).flatten(-2)
            return (z[None], *args[1:])

        return hook

    def _bias(self, run: Any, layer: int) -> Any:
        def hook(module: Any, _args: Any, out: Tensor) -> Tensor | None:
            sae = self.saes.get(layer)
            whole = sae is not None and sae.cfg.metadata.hook_name.endswith("hook_attn_out")
            run["attn_raw", layer] = out[0].detach()
            if run["live"] or whole:
                if whole and not run["live"]:
                    # live again from the kept z, for the features that read what is added
                    weight = module.weight.detach()
                    z = run["z", layer]
                    again = z @ (weight if self.kind == "gpt2" else weight.T)
                    bias = 0 if module.bias is None else module.bias.detach()
                    return (again + bias)[None]
                return None
            name = f"attn_bias:{layer}"
            if name not in run["leaves"]:
                self._leaf(run, name)
            if module.bias is None:
                return None
            bias = module.bias.detach()
            return out - bias + bias * run["leaves"][name][:, None]

        return hook

    def _attention(self, run: Any, layer: int) -> Any:
        def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
            out, sae = out[0], self.saes.get(layer)
            if sae is not None and sae.cfg.metadata.hook_name.endswith("hook_attn_out"):
                run["attn_out", layer] = out
                out = self._split(run, "attn", layer, sae, out, out)
            return self._probed(run, ("attn", layer), out)[None]

        return hook

    def _keep_stream(self, run: Any, layer: int) -> Any:
        return lambda _module, args, _out: run.update({("stream", layer): args[0][0]})

    def _keep_input(self, run: Any, layer: int) -> Any:
        return lambda _module, args: run.update({("mlp_in", layer): args[0][0]})

    def _held(self, _module: Any, args: Any, out: Tensor) -> Tensor:
        """An activation with its ratio held; a gate is held whole."""
        gated = self.kind in ("llama", "gemma2")
        return out.detach() if gated else args[0] * (out / args[0]).detach()

    def _before_norm(self, sae: Any) -> bool:
        out = None if sae is None else sae.cfg.metadata.hook_name_out
        return self.kind == "gemma2" and (out or "").endswith("mlp.hook_out")

    def _raw(self, run: Any, layer: int) -> Any:
        def hook(_module: Any, _args: Any, out: Tensor) -> Tensor | None:
            sae = self.transcoders.get(layer)
            run["mlp_raw", layer] = out[0].detach()
            if not self._before_norm(sae):
                return None
            read = self._read(run, layer, sae)
            return self._split(run, "tc", layer, sae, read, out[0])[None]

        return hook

    def _mlp(self, run: Any, layer: int) -> Any:
        def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
            out, sae = out[0], self.transcoders.get(layer)
            run["mlp_out", layer] = out
            if self._before_norm(sae):
                pass  # split already
            elif sae is not None:
                kind = "tc" if "transcoder" in sae.cfg.architecture() else "mlp_sae"
                out = self._split(run, kind, layer, sae, self._read(run, layer, sae), out)
            elif not run["live"]:
                out = out.detach() * self._leaf(run, f"mlp:{layer}")[:, None]
            return self._probed(run, ("mlp", layer), out)[None]

        return hook

    def _read(self, run: Any, layer: int, sae: Any) -> Tensor:
        """What an MLP's dictionary reads, live."""
        name, stream = sae.cfg.metadata.hook_name, run["stream", layer]
        if name.endswith("hook_mlp_out"):
            return run["mlp_out", layer]
        if name.endswith(("hook_resid_mid", "hook_resid_pre")):
            return stream
        if name.endswith("mlp.hook_in"):
            return run["mlp_in", layer]
        assert name.endswith("ln2.hook_normalized")
        eps = self._module(layer, 3)
        eps = getattr(eps, "eps", None) or eps.variance_epsilon
        if self.kind in ("gpt2", "gpt_neox"):
            stream = stream - stream.mean(-1, keepdim=True)
        return stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt().detach()

    def _probed(self, run: Any, place: Any, out: Tensor) -> Tensor:
        """``out`` with a probe added where the gradient is wanted."""
        if not run["live"]:
            return out
        probe = torch.zeros_like(out, requires_grad=True)
        run["probes"][place] = probe
        return out + probe

    # -- answers ---------------------------------------------------------------------------------

    def _value(self, run: Any, node: Any, tokens: tuple[int, int]) -> Tensor:
        """A feature's pre-activation or a difference of logits, in a run."""
        match node.kind:
            case "attn":
                sae = self.saes[node.layer]
                site = "z" if sae.cfg.metadata.hook_name.endswith("hook_z") else "attn_out"
                return self.pre(sae, run[site, node.layer])[node.position, node.feature]
            case "tc" | "mlp_sae":
                sae = self.transcoders[node.layer]
                read = self._read(run, node.layer, sae)
                return self.pre(sae, read)[node.position, node.feature]
            case "resid" | "resid_mid":
                sae, stream = self.residual[node.kind, node.layer], run[node.kind, node.layer]
                return self.pre(sae, stream)[node.position, node.feature]
            case "logit_diff":
                at = run["logits"][node.position]
                return at[tokens[0]] - at[tokens[1]]
        raise ValueError(node.kind)

    def gradients(self, root: Any, tokens: tuple[int, int]) -> dict[Any, Tensor]:
        """``[position, d_model]`` of a root at every place, through all paths."""
        probes = self.live["probes"]
        value = self._value(self.live, root, tokens)
        found = torch.autograd.grad(
            value, list(probes.values()), retain_graph=True, allow_unused=True
        )
        return {
            place: torch.zeros_like(probes[place]) if g is None else g
            for place, g in zip(probes, found, strict=True)
        }

    def row(
        self, node: Any, tokens: tuple[int, int], places: Mapping[Any, Tensor]
    ) -> tuple[dict[str, float], float]:
        """In-edges by node id, and the value, of a node; ``places`` from :meth:`gradients`."""
        run = self.direct
        match node.kind:
            case "mlp":
                out = run["mlp_out", node.layer]
                value = places["mlp", node.layer][node.position] @ out[node.position]
            case "tc_skip":
                out = run["skip", node.layer][node.position]
                if self._before_norm(self.transcoders[node.layer]):
                    raw, norm = run["mlp_raw", node.layer], self._module(node.layer, 4)
                    scale = (raw[node.position].square().mean() + norm.eps).sqrt()
                    out = out / scale * (1 + norm.weight.detach())
                value = places["mlp", node.layer][node.position] @ out
            case "head":
                z = run["z", node.layer].unflatten(-1, (self.n_heads, -1))
                weight = self._module(node.layer, 1).weight.detach()
                weight = weight if self.kind == "gpt2" else weight.T
                W_O = weight.unflatten(0, (self.n_heads, -1))[node.head]
                out = z[node.position, node.head] @ W_O
                if self.kind == "gemma2":
                    raw = run["attn_raw", node.layer][node.position]
                    norm = self._module(node.layer, 2)
                    scale = (raw.square().mean() + norm.eps).sqrt()
                    out = out / scale * (1 + norm.weight.detach())
                value = places["attn", node.layer][node.position] @ out
            case _:
                value = self._value(run, node, tokens)
        leaves = run["leaves"]
        gradients = torch.autograd.grad(
            value, list(leaves.values()), retain_graph=True, allow_unused=True
        )
        edges = {}
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            for index in gradient.nonzero().tolist():
                inner = "".join(f"{i}" if name.endswith(".") else f":{i}" for i in index[1:])
                edges[f"{name}{inner}@{index[0]}"] = float(gradient[tuple(index)])
        return edges, float(value.detach())
