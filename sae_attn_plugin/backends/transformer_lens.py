"""TransformerLens models: ``HookedTransformer``, sae_lens' subclass, ``TransformerBridge``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sae_attn_plugin.backends.architectures import (
    Architecture,
    find_architecture,
    read_mlp,
    read_norm,
)
from sae_attn_plugin.backends.protocol import (
    Edit,
    Geometry,
    LayerWeights,
    MlpWeights,
    Norm,
    Site,
    check_editable,
    lock_of,
    self_check,
)
from sae_attn_plugin.backends.scores import (
    Rotary,
    ScoreWeights,
    need_plain_norm,
    read_score_parts,
)
from sae_attn_plugin.errors import BackendError, InputError, UnsupportedError

# TransformerLens' own list of models whose ln1 and ln2 follow the blocks instead of feeding them.
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
# Hook names. On the bridge the canonical names are used: on some of its subclasses hooks at the
# alias names (hook_z, hook_resid_pre) never fire, and nothing says so.
_HOOKED = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
_BRIDGE = {
    "embed": "embed.hook_out",
    "pos_embed": "pos_embed.hook_out",
    "resid_pre": "blocks.{}.hook_in",
    "v": "blocks.{}.attn.v.hook_out",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.o.hook_in",
    "attn_out": "blocks.{}.attn.hook_out",
    "mlp_raw": "blocks.{}.mlp.hook_out",
    "mlp_out": "blocks.{}.mlp.hook_out",
}
# Sites that are the input of a module; both classes name the modules alike.
_MODULE_INPUTS = {"mlp_in": "blocks.{}.mlp", "resid_final": "ln_final", "unembed_in": "unembed"}
# Sites that are the output of a module. HookedTransformer calls ln1 once each for q, k and v, so an
# edit there runs three times on the same value.
_MODULE_OUTPUTS = {"mlp_raw": "blocks.{}.mlp"}


@dataclass(frozen=True)
class _Norms:
    """Names of a block's norms, by what they do."""

    before: str | None = "ln1"
    before_mlp: str | None = "ln2"
    after: str | None = None
    after_mlp: str | None = None


_NORM_KINDS = {"LN": "layer", "LNPre": "layer", "RMS": "rms", "RMSPre": "rms", None: "none"}


class _Done(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class TransformerLensBackend:
    """A TransformerLens model.

    Args:
        model: ``HookedTransformer``, ``HookedSAETransformer`` without attached SAEs, or
            ``TransformerBridge``.
        tokenizer: default: the model's own.

    Weights processed by TransformerLens are accepted where they leave z as it was: folded norms,
    centred writing weights and a centred unembedding. Folded value biases shift z by ``b_V`` (and
    the norm's bias through W_V), which an SAE trained on the original z would misread: refused.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.model = model
        self._bridge = isinstance(model, TransformerBridge)
        self.host = "transformer_bridge" if self._bridge else "hooked_transformer"
        self.tokenizer: Any = tokenizer or getattr(model, "tokenizer", None)
        # HookedTransformer does not keep the commit its weights came from.
        config = getattr(getattr(model, "original_model", None), "config", None)
        self.revision: str | None = getattr(config, "_commit_hash", None)
        cfg = model.cfg
        self._row: Architecture | None = None
        if self._bridge:
            self._row = find_architecture(getattr(config, "model_type", "") or cfg.architecture)
        if cfg.normalization_type not in _NORM_KINDS:
            raise UnsupportedError(
                f"normalization_type {cfg.normalization_type!r} of {cfg.model_name} is not known; "
                f"known: {', '.join(map(str, _NORM_KINDS))}"
            )
        if cfg.positional_embedding_type not in ("standard", "rotary", "alibi"):
            raise UnsupportedError(
                f"{cfg.model_name}: positional_embedding_type "
                f"{cfg.positional_embedding_type!r} is not supported; supported: standard, rotary, "
                "alibi"
            )
        if attached := list(
            getattr(model, "acts_to_saes", {}) or getattr(model, "_acts_to_saes", {})
        ):
            raise InputError(
                f"SAEs are attached to {', '.join(map(str, attached))}; call model.reset_saes() "
                "first: FeatureLens splices them itself"
            )
        weight = model.W_E if not self._bridge else model.embed.weight
        cap = getattr(cfg, "output_logits_soft_cap", None) or 0.0
        if self._row is not None and self._row.logit_soft_cap is not None:
            cap = getattr(config, self._row.logit_soft_cap, None) or 0.0
        self.geometry: Geometry = Geometry(
            model_name=cfg.model_name,
            architecture=getattr(cfg, "original_architecture", None)
            or getattr(cfg, "architecture", None)
            or "custom",
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_head=cfg.d_head,
            d_vocab=cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            learned_positions=self._has_learned_positions(),
            normalization=_NORM_KINDS[cfg.normalization_type],
            parallel=bool(cfg.parallel_attn_mlp),
            has_mlp=not cfg.attn_only,
            dtype=weight.dtype,
            device=weight.device,
            logit_soft_cap=cap if cap > 0 else None,
        )
        self._norms = self._find_norms()
        self.geometry = replace(self.geometry, mlp_post_norm=self._norms.after_mlp is not None)
        self._hooks, self._inputs, self._outputs = self._find_sites()
        if model.training:
            raise InputError(
                "the model is in training mode (dropout is on); call model.eval() first"
            )
        self._refuse_folded_values()
        self_check(self)

    def _find_norms(self) -> _Norms:
        if self._row is not None:
            # The bridge's ln1 and ln2 are whatever norms come first; their paths tell which.
            names = {
                getattr(module, "name", None): name
                for name, module in self.model.blocks[0].named_children()
            }
            row = self._row
            paths = (row.norm, row.mlp_norm, row.post_norm, row.mlp_post_norm)
            return _Norms(*(None if path is None else names[path] for path in paths))
        cfg = self.model.cfg
        if cfg.normalization_type is None:
            return _Norms(None, None)
        if cfg.original_architecture in _POST_NORM:
            return _Norms(None, None, "ln1", "ln2")
        if getattr(cfg, "use_normalization_before_and_after", False):
            return _Norms("ln1", "ln2", "ln1_post", "ln2_post")
        return _Norms()

    def _find_sites(self) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """Hook names, modules whose input and modules whose output is a site, by site."""
        norms, inputs, outputs = self._norms, dict(_MODULE_INPUTS), dict(_MODULE_OUTPUTS)
        hooks = dict(_BRIDGE if self._bridge else _HOOKED)
        if norms.before is not None:
            outputs["attn_in"] = f"blocks.{{}}.{norms.before}"
        if self._bridge:
            del outputs["mlp_raw"]
            for site, name in (("attn_out", norms.after), ("mlp_out", norms.after_mlp)):
                if name is not None:
                    hooks[site] = f"blocks.{{}}.{name}.hook_out"
        elif self.geometry.normalization == "none":
            inputs["resid_final"] = "unembed"  # ln_final is never called
        return hooks, inputs, outputs

    def _has_learned_positions(self) -> bool:
        if self._bridge:
            return hasattr(self.model, "pos_embed")
        return self.model.cfg.positional_embedding_type == "standard"

    def _refuse_folded_values(self) -> None:
        """Value biases that are all exactly zero beside live output biases have been folded."""
        if self._bridge and not getattr(self.model, "compatibility_mode", False):
            return
        weights = [self.layer_weights(layer) for layer in range(self.geometry.n_layers)]
        if not any(w.b_V.any() for w in weights) and any(w.b_O.any() for w in weights):
            raise BackendError(
                f"{self.geometry.model_name}: the value biases are folded into b_O "
                "(fold_value_biases=True, TransformerLens' default processing): all are exactly "
                "zero while b_O is not. hook_z is then not the z that SAEs are trained on. Load "
                "the model with HookedTransformer.from_pretrained_no_processing(...), or pass "
                "fold_value_biases=False; a family without value biases runs on TransformerBridge "
                "or nnsight"
            )

    # -- weights ---------------------------------------------------------------------------------

    def layer_weights(self, layer: int) -> LayerWeights:
        block, g = self.model.blocks[layer], self.geometry
        attn = block.attn
        # HookedTransformer keeps grouped values under a leading underscore and expands W_V.
        grouped = not self._bridge and g.n_kv_heads != g.n_heads
        W_V, b_V = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
        W_V, W_O = W_V.detach(), attn.W_O.detach()
        before, before_mlp, after, after_mlp = (
            None if name is None else self._norm(getattr(block, name))
            for name in (
                *(self._norms.before, self._norms.before_mlp if g.has_mlp else None),
                *(self._norms.after, self._norms.after_mlp if g.has_mlp else None),
            )
        )
        return LayerWeights(
            W_V=W_V,
            b_V=W_V.new_zeros(g.n_kv_heads, g.d_head)
            if b_V is None
            else b_V.detach().reshape(g.n_kv_heads, g.d_head),
            W_O=W_O,
            b_O=W_O.new_zeros(g.d_model) if attn.b_O is None else attn.b_O.detach(),
            norm=before or Norm("none"),
            mlp_norm=before_mlp,
            post_norm=after,
            mlp_post_norm=after_mlp,
        )

    def score_weights(self, layer: int, n_positions: int) -> ScoreWeights:
        attn, g = self.model.blocks[layer].attn, self.geometry
        grouped = not self._bridge and g.n_kv_heads != g.n_heads
        W_K, b_K = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
        W_Q, b_Q, W_K = attn.W_Q.detach(), attn.b_Q, W_K.detach()
        if self._row is not None:
            model = self.model.original_model
            parts = read_score_parts(model, self._row, g, layer, n_positions)
        else:
            parts = self._hooked_score_parts(attn, n_positions)
        return ScoreWeights(
            W_Q=W_Q,
            b_Q=W_Q.new_zeros(g.n_heads, g.d_head)
            if b_Q is None
            else b_Q.detach().reshape(g.n_heads, g.d_head),
            W_K=W_K,
            b_K=W_K.new_zeros(g.n_kv_heads, g.d_head)
            if b_K is None
            else b_K.detach().reshape(g.n_kv_heads, g.d_head),
            **parts,
        )

    def _hooked_score_parts(self, attn: Any, n_positions: int) -> dict[str, Any]:
        """What a HookedTransformer does to queries, keys and scores besides projecting."""
        cfg, g = self.model.cfg, self.geometry
        for name in ("clip_qkv", "use_logn_attn"):
            if getattr(cfg, name, None):
                raise UnsupportedError(
                    f"{cfg.model_name}: attention scores with {name} are not linear in queries and "
                    "keys, or not known here"
                )
        parts: dict[str, Any] = {
            "scale": 1 / float(attn.attn_scale),
            "soft_cap": cap if (cap := getattr(cfg, "attn_scores_soft_cap", 0) or 0) > 0 else None,
        }
        for name in ("q_norm", "k_norm"):
            module = getattr(attn, name, None)
            if module is not None:
                norm = Norm("rms", float(module.eps), module.w.detach())
                parts[name] = need_plain_norm(norm, cfg.model_name)
        if cfg.positional_embedding_type == "rotary":
            # Running it makes the tables what they are for a prompt of this length.
            like = torch.zeros(1, n_positions, 1, g.d_head, dtype=g.dtype, device=g.device)
            with torch.no_grad():
                attn.apply_rotary(like)
            parts["rotary"] = Rotary(
                attn.rotary_cos[:n_positions].detach(),
                attn.rotary_sin[:n_positions].detach(),
                bool(cfg.rotary_adjacent_pairs),
            )
            for name in ("use_NTK_by_parts_rope", "use_yarn_rope", "use_dynamic_ntk_rope"):
                if getattr(cfg, name, False):
                    parts["rope"] = name
        elif cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(cfg.n_heads, device=g.device)
            parts["alibi_slopes"] = slopes.to(g.dtype)
        return parts

    def mlp_weights(self, layer: int) -> MlpWeights:
        if self._row is not None:
            return read_mlp(self.model.original_model, self._row, layer)
        mlp, cfg = self.model.blocks[layer].mlp, self.model.cfg
        activation = getattr(mlp, "act_fn", None)
        if not hasattr(mlp, "W_in") or activation is None or cfg.act_fn.endswith("_ln"):
            raise UnsupportedError(
                f"{cfg.model_name}: mlp='linearise' needs MLPs with one activation between two "
                f"matrices, gated or not; got {type(mlp).__name__} with {cfg.act_fn!r}"
            )

        def get(name: str) -> Tensor | None:
            value = getattr(mlp, name, None)
            return None if value is None else value.detach()

        W_in, W_out = mlp.W_in.detach(), mlp.W_out.detach()
        W_gate, b_in, b_out = get("W_gate"), get("b_in"), get("b_out")
        if W_gate is not None and b_in is not None:
            # TransformerLens adds it after the gate.
            shift = b_in @ W_out
            b_in, b_out = None, shift if b_out is None else b_out + shift
        return MlpWeights(W_in, W_out, activation, b_in, b_out, W_gate)

    def final_norm(self) -> Norm:
        kind = self.geometry.normalization
        return Norm("none") if kind == "none" else self._norm(self.model.ln_final)

    def _norm(self, module: Any) -> Norm:
        if self._row is not None:
            return read_norm(module.original_component, self._row)
        weight, bias = (getattr(module, name, None) for name in ("w", "b"))
        return Norm(
            self.geometry.normalization,
            float(module.eps),
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
        )

    def unembed(self) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.model.unembed, "b_U", None)
        return self.model.W_U.detach(), None if bias is None else bias.detach()

    # -- forward ---------------------------------------------------------------------------------

    def hook_name(self, site: Site) -> str:
        """The model's own name of the hook point at a site."""
        return self._hooks[site.name].format(site.layer)

    def forward(
        self,
        tokens: Tensor,
        edits: Mapping[Site, Edit] | None = None,
        reads: Iterable[Site] = (),
    ) -> dict[Site, Tensor]:
        with lock_of(self.model):
            return self._forward(tokens, edits, reads)

    def read(self, tokens: Tensor, reads: Iterable[Site]) -> dict[Site, Tensor]:
        """Sites of a forward pass that ends at the last of them."""
        reads = set(reads)
        with lock_of(self.model):
            found = self._forward(tokens, None, reads, logits=Site("logits") in reads)
        return {site: found[site] for site in reads}

    def _forward(
        self,
        tokens: Tensor,
        edits: Mapping[Site, Edit] | None,
        reads: Iterable[Site],
        logits: bool = True,
    ) -> dict[Site, Tensor]:
        edits = dict(edits or {})
        wanted = set(reads) | set(edits)
        check_editable(edits)
        found: dict[Site, Tensor] = {}

        def visit(value: Tensor, site: Site) -> Tensor | None:
            shaped = self._to_site(value, site)
            if site in edits:
                shaped = edits[site](shaped)
            found[site] = shaped
            if not logits and len(found) == len(wanted):
                raise _Done
            return shaped.reshape(value.shape) if site in edits else None

        hooks, handles = [], []
        try:
            for site in sorted(wanted - {Site("logits")}):
                if site.name in self._inputs:
                    module = self._module(self._inputs, site)
                    hook = functools.partial(_module_input, visit, site)
                    handles.append(module.register_forward_pre_hook(hook))
                elif site.name in self._outputs:
                    module = self._module(self._outputs, site)
                    hook = functools.partial(_module_output, visit, site)
                    handles.append(module.register_forward_hook(hook))
                elif site.name in self._hooks:
                    hook = functools.partial(_hook, visit, site)
                    hooks.append((self.hook_name(site), hook))
            with torch.no_grad():
                # Without a mask, a tokenizer that pads on the left makes TransformerLens guess one
                # from the tokens, and hide those that look like padding.
                found[Site("logits")] = self.model.run_with_hooks(
                    tokens,
                    return_type="logits",
                    attention_mask=torch.ones_like(tokens),
                    fwd_hooks=hooks,
                )
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := wanted - set(found):
            raise BackendError(
                f"{self.geometry.model_name} on {self.host}: these sites were never reached, "
                f"although the model ran: {', '.join(map(str, sorted(missing)))}. Hook points that "
                "an attached SAE replaced stay broken after reset_saes(); load the model afresh"
            )
        return found

    def _module(self, paths: Mapping[str, str], site: Site) -> torch.nn.Module:
        return functools.reduce(getattr, paths[site.name].format(site.layer).split("."), self.model)

    def _to_site(self, value: Tensor, site: Site) -> Tensor:
        g = self.geometry
        heads = {"z": g.n_heads, "v": g.n_kv_heads}.get(site.name)
        return value if heads is None else value.reshape(*value.shape[:2], heads, g.d_head)


def _hook(visit: Any, site: Site, value: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
    return visit(value, site)


def _module_input(visit: Any, site: Site, module: Any, args: tuple[Any, ...]) -> Any:  # noqa: ARG001
    value = visit(args[0], site)
    return None if value is None else (value, *args[1:])


def _module_output(visit: Any, site: Site, module: Any, args: Any, value: Tensor) -> Any:  # noqa: ARG001
    return visit(value, site)
