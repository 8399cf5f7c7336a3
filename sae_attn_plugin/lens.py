"""FeatureLens: a model and its attention SAEs, and what they say about a prompt."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.attribution.dfa import (
    DFA,
    attribution_by_source,
    direct_feature_attribution,
)
from sae_attn_plugin.attribution.frozen import (
    BatchEncoder,
    FrozenResidual,
    FrozenRun,
    LinearMlp,
    freeze,
    freeze_residuals,
    linearise,
)
from sae_attn_plugin.attribution.qk import (
    FrozenScores,
    QKAttribution,
    ScoreReader,
    check_pattern,
    freeze_scores,
    qk_attribution,
    score_reader,
)
from sae_attn_plugin.attribution.rdfa import edges_by_head, sweep
from sae_attn_plugin.attribution.readers import StreamReader, logit_reader
from sae_attn_plugin.attribution.table import Attribution
from sae_attn_plugin.attribution.writers import WriterTable, WriterVectors, write_table
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import (
    Backend,
    Capture,
    MlpWeights,
    capture,
    check_mlps,
    uncapped_logits,
)
from sae_attn_plugin.backends.scores import need_scores
from sae_attn_plugin.dictionaries import (
    Dictionary,
    Encoded,
    chosen_layers,
    head_attribution,
    place,
    place_mlp,
    place_residual,
)
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.fingerprints import fingerprint, model_fingerprint, source_of
from sae_attn_plugin.graphs.aligned import AlignedAttribution, Aligner
from sae_attn_plugin.heads import fit
from sae_attn_plugin.interventions import apply, datasets, reading, result
from sae_attn_plugin.interventions.edits import Edit
from sae_attn_plugin.nodes import (
    FEATURE_KINDS,
    RESIDUAL_KINDS,
    Direction,
    Feature,
    FeatureKind,
    HeadScore,
    Logit,
    LogitDiff,
    Node,
    Target,
    quote,
    unquote,
)
from sae_attn_plugin.tasks.aligned import with_roles
from sae_attn_plugin.tasks.induction import InductionDataset
from sae_attn_plugin.tasks.ioi import IOIDataset
from sae_attn_plugin.tasks.roles import Roles, roles_of
from sae_attn_plugin.tokens import (
    as_index,
    check_ids,
    encode_prompt,
    need_tokenizer,
    own_convention,
    single_token,
    token_label,
    token_strings,
)

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_attn_plugin.graphs.html import Page

Dataset = IOIDataset | InductionDataset
# What the readers of a source position take: all writers, or the terms of the residual SAE there.
Expand = Literal["writers", "residual"]
_WHAT = {
    "attn": "SAE",
    "tc": "transcoder",
    "mlp_sae": "SAE on hook_mlp_out",
    "resid": "SAE on hook_resid_pre",
    "resid_mid": "SAE on hook_resid_mid",
}

_PROGRESS_LAYERS = 12  # fewer layers are done before a bar could be read
_TOP_LOGITS, _TOP_PROBABILITY = 10, 0.95  # as circuit-tracer's default targets


class FeatureLens:
    """A model seen through its attention-output SAEs.

    Args:
        model: ``HookedTransformer``, ``HookedSAETransformer``, ``TransformerBridge``, an nnsight
            model, or a bare Hugging Face model (which nnsight then runs).
        saes: a dict or list of sae_lens SAEs on ``hook_z`` or ``hook_attn_out`` (the hook names in
            their metadata say where they belong), a folder, or a sae_lens release name such as
            ``"gpt2-small-hook-z-kk"``. Layers without one are split by head instead; ``{}``: all.
        transcoders: the same for MLPs: sae_lens transcoders from the MLP's input to its output, or
            SAEs on ``hook_mlp_out``. The MLPs of layers without one are single nodes.
        residual_saes: the same for SAEs on ``hook_resid_pre``, ``hook_resid_mid`` or
            ``hook_resid_post``, for ``run.attribute(..., expand="residual")``.
        tokenizer: default: the model object's own.
        prepend_bos: whether string prompts get a BOS token. None: as the SAEs' metadata says,
            else the tokenizer's own convention.
        remote: for nnsight models: ``True`` runs every forward pass on nnsight's remote service,
            ``"local"`` serialises as a remote run does and runs here. The algebra stays here.

    Raises:
        InputError, UnsupportedError, BackendError: what does not fit, and what to do.

    The model is neither changed nor hooked between calls; SAEs are never attached to it.
    """

    def __init__(
        self,
        model: Any,
        saes: Any,
        *,
        transcoders: Any = None,
        residual_saes: Any = None,
        tokenizer: Any = None,
        prepend_bos: bool | None = None,
        remote: bool | str = False,
    ) -> None:
        self.backend: Backend = as_backend(model, tokenizer, remote)
        self.dictionaries: dict[int, Dictionary] = fit(
            place(saes, self.backend.geometry), self.backend
        )
        self.transcoders: dict[int, Dictionary] = place_mlp(transcoders, self.backend.geometry)
        self.residual_saes: dict[tuple[FeatureKind, int], Dictionary] = place_residual(
            residual_saes, self.backend.geometry
        )
        self._prepend_bos = prepend_bos

    def __repr__(self) -> str:
        g = self.backend.geometry
        layers: dict[str, list[str]] = {}
        for layer, dictionary in self.all_dictionaries():
            layers.setdefault(dictionary.hook, []).append(str(layer))
        found = "; ".join(f"{hook} of layers {', '.join(of)}" for hook, of in layers.items())
        return (
            f"FeatureLens({g.model_name} on {self.backend.host}: {g.n_layers} layers, "
            f"{g.n_heads} heads; {found or 'no SAEs'})"
        )

    def all_dictionaries(self) -> list[tuple[int, Dictionary]]:
        """Layer and dictionary: of attention first, then of MLPs, then of the residual stream."""
        residual = [(layer, d) for (_, layer), d in self.residual_saes.items()]
        return [*self.dictionaries.items(), *self.transcoders.items(), *residual]

    @functools.cached_property
    def mlp_weights(self) -> tuple[MlpWeights, ...]:
        """Of every layer, checked against the model on a short input.

        Raises:
            UnsupportedError: MLPs of another form than one activation between two matrices.
            BackendError: the model computes something else from them.
        """
        check_mlps(self.backend)
        return tuple(map(self.backend.mlp_weights, range(self.backend.geometry.n_layers)))

    def head_attribution(self, layer: int, dead_below: float = 1e-6) -> pd.DataFrame:
        """Weight-based head attribution of a layer's SAE; see :func:`head_attribution`.

        For an SAE on ``hook_attn_out`` the shares are those of its encoder, through this layer's
        W_O (and the gain of the norm between, where there is one).
        """
        chosen_layers(self.dictionaries, [layer])
        weights = self.backend.layer_weights(layer)
        W_O, norm = weights.W_O, weights.post_norm
        if norm is not None:  # row by row, the norm's output as a function of z
            W_O = norm.centre(W_O) if norm.weight is None else norm.centre(W_O) * norm.weight
        return head_attribution(self.dictionaries[layer], dead_below=dead_below, W_O=W_O)

    @property
    def tokenizer(self) -> Any:
        return self.backend.tokenizer

    @functools.cached_property
    def prepend_bos(self) -> bool:
        """Whether string prompts get a BOS token."""
        if self._prepend_bos is not None:
            return self._prepend_bos
        said = {
            bool(d.prepend_bos) for _, d in self.all_dictionaries() if d.prepend_bos is not None
        }
        if len(said) > 1:
            raise InputError(
                "the SAEs disagree on prepend_bos; pass prepend_bos=True or False to FeatureLens"
            )
        return said.pop() if said else own_convention(need_tokenizer(self.tokenizer))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What is needed to load the same model and SAEs again, as JSON values."""
        g = self.backend.geometry
        return {
            "model": g.model_name,
            "revision": self.backend.revision,
            "backend": self.backend.host,
            "dtype": str(g.dtype).removeprefix("torch."),
            "device": g.device.type,
            "saes": {str(layer): d.sae_id for layer, d in self.dictionaries.items()},
            "transcoders": {str(layer): d.sae_id for layer, d in self.transcoders.items()},
            "residual_saes": {
                f"{kind}:{layer}": d.sae_id for (kind, layer), d in self.residual_saes.items()
            },
            "sources": {
                "saes": source_of(self.dictionaries.values()),
                "transcoders": source_of(self.transcoders.values()),
                "residual_saes": source_of(self.residual_saes.values()),
            },
            "fingerprints": self._fingerprints,
            "versions": _versions(),
        }

    @functools.cached_property
    def _fingerprints(self) -> Mapping[str, Any]:
        """Of the weights, the same on every host."""
        return {
            "model": model_fingerprint(self.backend),
            "saes": {str(i): fingerprint(vars(d)) for i, d in self.dictionaries.items()},
            "transcoders": {str(i): fingerprint(vars(d)) for i, d in self.transcoders.items()},
            "residual_saes": {
                f"{kind}:{layer}": fingerprint(vars(d))
                for (kind, layer), d in self.residual_saes.items()
            },
        }

    def to_tokens(self, prompt: str | Sequence[Any] | Tensor) -> Int[Tensor, "batch position"]:
        """Token ids of a prompt, a list of prompts of equal length, or token ids."""
        rows = self._to_rows(prompt)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise InputError(
                f"the prompts have {lengths[0]} to {lengths[-1]} tokens and make no rectangle; "
                "lens.run(prompts) takes them, one tensor does not"
            )
        return torch.stack(rows)

    def _to_rows(self, prompt: str | Sequence[Any] | Tensor) -> list[Int[Tensor, " position"]]:
        """Token ids of each prompt, checked."""
        g = self.backend.geometry
        given: Any = [prompt] if isinstance(prompt, str) else prompt
        shape = getattr(given, "shape", None)  # of a tensor or a numpy array
        if shape is None and (isinstance(given, bytes) or not isinstance(given, Sequence)):
            raise InputError(f"expected a string, a list of strings or token ids, got {given!r}")
        if 0 in ([len(given)] if shape is None else shape[:1]):
            raise InputError("no prompt given; expected a string, a list of strings or token ids")
        if shape is None:
            if all(isinstance(text, str) for text in given):
                given = [encode_prompt(self.tokenizer, t, self.prepend_bos) for t in given]
            unequal = len({len(row) for row in given if isinstance(row, Sized)}) > 1
            if unequal and not any(isinstance(row, str | int) for row in given):
                return [check_ids(row, g.d_vocab, g.n_ctx, g.device)[0] for row in given]
        return list(check_ids(given, g.d_vocab, g.n_ctx, g.device))

    def run(self, prompt: str | Sequence[Any] | Tensor | Dataset) -> Run:
        """Run the model on a prompt, a list of prompts, or token ids ``[batch, position]``, or on
        all prompts of a data set (whose roles and answers the run then knows).

        Prompts may differ in length: those of equal length share a forward pass, and nothing is
        padded, so each gets the numbers it gets alone. ``run[i]`` is the run of one prompt, with
        its own tokens only. A run of unequal prompts has no ``tokens`` or ``logits`` as a whole.
        """
        roles = Roles()
        if isinstance(prompt, IOIDataset | InductionDataset):
            roles, prompt = roles_of(prompt), _token_rows(prompt)
        rows = self._to_rows(prompt)
        texts: tuple[str | None, ...] = (None,) * len(rows)
        if isinstance(prompt, str):
            texts = (prompt,)
        elif not isinstance(prompt, Tensor) and all(isinstance(text, str) for text in prompt):
            texts = tuple(prompt)
        lengths = [len(row) for row in rows]
        if len(set(lengths)) == 1:
            return Run(self, capture(self.backend, torch.stack(rows)), texts, roles)
        runs: dict[int, Run] = {}
        for length in dict.fromkeys(lengths):
            members = [i for i, n in enumerate(lengths) if n == length]
            tokens = torch.stack([rows[i] for i in members])
            found = capture(self.backend, tokens)
            group = Run(self, found, tuple(texts[i] for i in members), roles.pick(members))
            runs |= {i: group[k] for k, i in enumerate(members)}
        return UnequalRun(self, [runs[i] for i in range(len(rows))], roles)

    def run_rows(self, dataset: Dataset, members: Sequence[int]) -> Run:
        """Run the model on some prompts of a data set."""
        rows = _token_rows(dataset, members)
        lengths = {len(row) for row in rows}
        run = self.run(rows)
        if len(lengths) > 1:
            return UnequalRun(
                self, [run[i] for i in range(len(run))], roles_of(dataset).pick(members)
            )
        return Run(self, run.capture, run.prompts, roles_of(dataset).pick(members))

    def attribute_many(
        self,
        prompts: Any,
        target: Target
        | Sequence[Target]
        | Callable[[int], Target | Sequence[Target]]
        | None = None,
        *,
        align: Any = None,
        other: Literal["bucket", "drop"] = "bucket",
        nodes: float = 0.8,
        edges: float = 0.98,
        max_nodes: int | None = None,
        node_budget: int | None = 2000,
        progress: bool | None = None,
    ) -> AlignedAttribution:
        """Attributions over a data set, averaged between positions of the same role.

        Args:
            prompts: a data set with roles (``IOIDataset``), or a list of prompts of any lengths.
            target: one for all prompts, or a function of the prompt's number. None: the logit
                difference of the data set's ``correct`` and ``wrong`` at END.
            align: roles: names of a data set's (default IO, S1, S2, END, AND), a dict of role to
                one position per prompt, or one dict of role to position per prompt. Several roles
                at one position of a prompt are a place of their own (``@S1+1=AND``).
            other: positions without a role: summed under ``@other``, or left out and counted.
            nodes, edges, max_nodes: pruning of each prompt's graph, as in :meth:`Run.graph`; what
                is pruned counts as absent. 1 and 1: everything.
            node_budget: as in :meth:`Run.attribute`.
            progress: show a bar; None: on a terminal.

        Returns:
            Mean, standard error, bootstrap interval and presence of every edge; see
            :class:`~sae_attn_plugin.AlignedAttribution`, whose ``contrast`` compares two sets.

        Raises:
            InputError: a role that a prompt lacks, a position out of range, no target.

        One prompt is held in memory at a time; of each, the edges by role are kept.
        """
        given = with_roles(prompts, align)
        if target is None and (given.correct is None or given.wrong is None):
            raise InputError("these prompts name no answers; pass target=")
        aligner = Aligner(given.roles, other)
        disable = None if progress is None else not progress
        bar = tqdm(given.prompts, desc="attributing", unit="prompt", disable=disable, leave=False)
        for number, prompt in enumerate(bar):
            run = self.run(prompt if isinstance(prompt, str) else [prompt])
            at = given.at(number, run.tokens.shape[1])
            if callable(target):
                wanted: Any = target(number)
            elif target is None:
                assert given.correct is not None
                assert given.wrong is not None
                end = at.get("END", -1)
                wanted = LogitDiff(given.correct[number], given.wrong[number], end)
            else:
                wanted = target
            attribution = run.attribute(wanted, node_budget=node_budget, progress=False)
            if (nodes, edges, max_nodes) != (1, 1, None):
                attribution = attribution.prune(nodes, edges, max_nodes)
            aligner.add(attribution, at)
        g = self.backend.geometry
        settings = {
            "model": g.model_name,
            "revision": self.backend.revision,
            "backend": self.backend.host,
            "dtype": str(g.dtype).removeprefix("torch."),
            "saes": {str(layer): d.sae_id for layer, d in self.dictionaries.items()},
            "pruning": {"nodes": nodes, "edges": edges, "max_nodes": max_nodes},
            "node_budget": node_budget,
            "other": other,
            "versions": dict(_versions()),
        }
        return aligner.finish(settings, given.pairs)

    def intervene(
        self,
        run: Run,
        edits: Sequence[Edit],
        freeze: apply.Frozen = (),
        *,
        sources: Mapping[str, Run | Dataset] | None = None,
        max_new_tokens: int = 0,
        patterns: Sequence[int] = (),
        scores: Sequence[int] = (),
    ) -> result.InterventionResult:
        """Run the model again with edits; see :func:`interventions.apply.intervene`."""
        return apply.intervene(
            self,
            run,
            edits,
            freeze,
            sources=sources,
            max_new_tokens=max_new_tokens,
            patterns=patterns,
            scores=scores,
        )

    def intervene_dataset(
        self,
        dataset: Dataset,
        edits: Sequence[Edit] | Mapping[str, Sequence[Edit]],
        freeze: apply.Frozen = (),
        *,
        sources: Mapping[str, Run | Dataset] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Edit every prompt of a data set, a batch at a time; see
        :func:`interventions.datasets.intervene_dataset`."""
        return datasets.intervene_dataset(
            self,
            dataset,
            edits,
            freeze,
            sources=sources,
            batch_size=batch_size,
            progress=progress,
        )


class Run:
    """One forward pass: what attention computed on a prompt, and from where.

    A run over several prompts holds them side by side; ``run[i]`` is the run of one.

    Attributes:
        tokens: ``[batch, position]`` ids.
        logits: ``[batch, position, d_vocab]`` as the model returns them, after any soft-cap.
        prompts: the strings, where strings were given.
        roles: where the roles of a data set stand in each prompt, and its answers.
    """

    _encoded_as: tuple[BatchEncoder, int] | None = None

    def __init__(
        self,
        lens: FeatureLens,
        captured: Capture,
        prompts: tuple[str | None, ...],
        roles: Roles | None = None,
    ) -> None:
        self.lens = lens
        self.capture = captured
        self.prompts = prompts
        self.roles: Roles = roles or Roles()

    @functools.cached_property
    def _encoder(self) -> BatchEncoder:
        """Of the whole batch: prompts that are asked for one by one share its products."""
        return BatchEncoder(self.lens.backend, self.capture, self.lens.dictionaries)

    @property
    def tokens(self) -> Int[Tensor, "batch position"]:
        return self.capture.tokens

    @property
    def logits(self) -> Float[Tensor, "batch position d_vocab"]:
        return self.capture.logits

    @functools.cached_property
    def token_strings(self) -> tuple[str, ...]:
        """The prompt's tokens as text."""
        return token_strings(self.lens.tokenizer, self._one.tokens[0].tolist())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Run:
        index = range(len(self))[index]  # IndexError past the end, as for a list
        values = {site: value[index : index + 1] for site, value in self.capture.values.items()}
        one = Run(
            self.lens,
            Capture(self.tokens[index : index + 1], values),
            self.prompts[index : index + 1],
            self.roles.pick([index]),
        )
        one._encoded_as = (self._encoder, index) if len(self) > 1 else self._encoded_as
        return one

    def pick(self, members: Sequence[int]) -> Run:
        """The run of some prompts, in the order given."""
        members = list(members)
        if members == list(range(len(self))):
            return self
        values = {site: value[members] for site, value in self.capture.values.items()}
        prompts = tuple(self.prompts[i] for i in members)
        return Run(
            self.lens, Capture(self.tokens[members], values), prompts, self.roles.pick(members)
        )

    @property
    def lengths(self) -> list[int]:
        """How many tokens each prompt has."""
        return [self.tokens.shape[1]] * len(self)

    def __repr__(self) -> str:
        return f"Run of {len(self)} prompt(s), {self.tokens.shape[1]} tokens"

    @property
    def _one(self) -> Run:
        if len(self) != 1:
            raise InputError(f"this run holds {len(self)} prompts; pick one: run[i]")
        return self

    @functools.cached_property
    def frozen(self) -> FrozenRun:
        """The run with patterns and norm scales held constant, as plain tensors."""
        lens = self.lens
        return freeze(
            lens.backend,
            self._one.capture,
            lens.dictionaries,
            transcoders=lens.transcoders,
            encoded_as=self._encoded_as,
        )

    @functools.cached_property
    def linear_mlps(self) -> tuple[LinearMlp, ...]:
        """Every MLP with its activation ratios frozen."""
        weights = self.lens.mlp_weights
        mlps = [layer.mlp for layer in self.frozen.layers]
        return tuple(linearise(m, w) for m, w in zip(mlps, weights, strict=True) if m is not None)

    @functools.cached_property
    def _lean(self) -> dict[str, WriterTable]:
        """Tables that make their rows when they are asked for."""
        return {}

    @functools.cached_property
    def writers(self) -> WriterTable:
        """Every term of the residual stream."""
        return write_table(self.frozen)

    @functools.cached_property
    def residuals(self) -> dict[int, FrozenResidual]:
        """The residual stream split by each residual SAE, by the depth of what reads it there."""
        saes = self.lens.residual_saes.values()
        return freeze_residuals(self.frozen, self._one.capture, saes)

    @functools.cached_property
    def all_writers(self) -> WriterTable:
        """:attr:`writers`, and apart from them the terms of residual SAEs, where there are any."""
        if not self.lens.residual_saes:
            return self.writers
        return write_table(self.frozen, residuals=tuple(self.residuals.values()))

    def _writers_within(self, limit: int, split: bool) -> WriterTable:
        """The writers (with the terms of residual SAEs) in at most so many bytes, or in as few as
        can be."""
        split = split and bool(self.lens.residual_saes)
        name = "all_writers" if split else "writers"
        known = self.__dict__.get(name)
        if known is not None and known.vectors.nbytes <= limit:
            return known
        if name not in self._lean:
            residuals = tuple(self.residuals.values()) if split else ()
            made = write_table(self.frozen, residuals=residuals, at_most=limit)
            if isinstance(made.vectors, WriterVectors):
                self.__dict__[name] = made
                return made
            self._lean[name] = made
        return self._lean[name]

    @functools.cached_property
    def reads(self) -> dict[tuple[str, int], Float[Tensor, "batch position ..."]]:
        """What each dictionary reads, by the kind of its features and its layer."""
        lens, values = self.lens, self.capture.values
        return {
            (d.kind, layer): reading.what_it_reads(lens, d, values)
            for layer, d in lens.all_dictionaries()
        }

    # -- questions -------------------------------------------------------------------------------

    def features(
        self,
        layer: int | None = None,
        position: int | None = None,
        kind: FeatureKind = "attn",
    ) -> pd.DataFrame:
        """Active features: ``layer, position, token, feature, activation, pre_activation``.

        Args:
            layer: one layer only. position: one position only, negative from the end.
            kind: ``"attn"``, ``"tc"`` (transcoders), ``"mlp_sae"`` (SAEs on MLP outputs),
                ``"resid"`` or ``"resid_mid"`` (SAEs on the residual stream).
        """
        if len(self) > 1:
            frames = [self[i].features(layer, position, kind) for i in range(len(self))]
            return pd.concat(frames, keys=range(len(self)), names=["prompt", None]).reset_index(
                level="prompt"
            )
        known = [number for number, d in self.lens.all_dictionaries() if d.kind == kind]
        layers = known if layer is None else [self.resolve_layer(layer, kind)]
        frames = []
        for number in layers:
            encoded = self._encoded(number, kind)
            positions = encoded.position.numpy(force=True)
            frames.append(
                pd.DataFrame(
                    {
                        "layer": number,
                        "position": positions,
                        "token": [self.token_strings[p] for p in positions],
                        "feature": encoded.feature.numpy(force=True),
                        "activation": encoded.activation.numpy(force=True),
                        "pre_activation": encoded.pre_activation.numpy(force=True),
                    }
                )
            )
        if not frames:
            names = ["layer", "position", "token", "feature", "activation", "pre_activation"]
            return pd.DataFrame({name: [] for name in names})
        frame = pd.concat(frames, ignore_index=True)
        if position is None:
            return frame
        here = np.flatnonzero(frame["position"] == self.resolve_position(position))
        return frame.take(here).reset_index(drop=True)

    def _encoded(self, layer: int, kind: FeatureKind) -> Encoded:
        if kind in RESIDUAL_KINDS:
            return self.residuals[2 * layer + (2 if kind == "resid_mid" else 1)].encoded
        frozen = self.frozen.layers[layer]
        encoded = frozen.encoded if kind == "attn" else frozen.mlp and frozen.mlp.encoded
        assert encoded is not None
        return encoded

    def dfa(self, layer: int, feature: int, position: int = -1) -> DFA:
        """Direct feature attribution of a feature at a destination position, active or not."""
        number, at = self.resolve_layer(layer), self.resolve_position(position)
        feature = self.resolve_feature(number, feature)
        split, constant, pre = direct_feature_attribution(self.frozen.layers[number], feature, at)
        return DFA(number, feature, at, split, constant, pre, self.token_strings)

    def dfa_by_source(
        self, layer: int, features: int | Sequence[int] | Tensor
    ) -> Float[Tensor, "feature destination source"]:
        """:meth:`dfa` of some features at every destination at once, summed over heads.

        ``out[i, q].sum()`` is the pre-activation of ``features[i]`` at ``q``, less the ``constant``
        of ``run.dfa(layer, features[i], q)``.
        """
        number = self.resolve_layer(layer)
        wanted = features.tolist() if isinstance(features, Tensor | np.ndarray) else features
        wanted = list(wanted) if isinstance(wanted, Sequence) else [wanted]
        checked = [self.resolve_feature(number, one) for one in wanted]
        frozen = self.frozen.layers[number]
        return attribution_by_source(frozen, torch.tensor(checked, device=frozen.z.device).long())

    def qk(self, layer: int, head: int, query: int, key: int) -> QKAttribution:
        """Why a head looks where it looks: its pre-softmax score, term by term.

        Args:
            layer: any layer, with or without an SAE. head: in it.
            query, key: positions, negative from the end; ``key <= query``.

        Raises:
            InputError: no such layer, head or position; a key after its query; a masked key.
            UnsupportedError, BackendError: scores of this model that are not known here.
        """
        layer = self._resolve_any_layer(layer)
        query, key = self.resolve_position(query), self.resolve_position(key)
        scores = self._checked_scores(layer, query)
        head = as_index(head, "head")
        return qk_attribution(scores, self.writers, head, query, key, self.token_strings)

    def attribute(
        self,
        target: Target | Sequence[Target] | None = None,
        *,
        weights: Sequence[float] | None = None,
        mlp: Literal["terminal", "linearise"] = "terminal",
        heads: Literal["terminal", "linearise"] = "terminal",
        expand: Expand | Mapping[Expand, Sequence[int]] = "writers",
        residual: Literal["terminal", "recurse"] = "terminal",
        node_budget: int | None = 2000,
        edges_per_target: int | None = None,
        memory_budget: int = 2 * 2**30,
        progress: bool | Callable[[int, int], object] | None = None,
    ) -> Attribution:
        """Recursive DFA: who writes what the target reads, down to the tokens.

        Args:
            target: one target or several (weighted equally). None: the top logits at the last
                position, cumulative probability 0.95 and ten at most, weighted by probability.
            weights: of the targets, where they should differ; made to sum to 1.
            mlp: ``"linearise"``: raw MLPs, and features of SAEs on MLP outputs, get in-edges of
                their own, through the MLP with the ratios activation(pre) / pre frozen (the gate,
                for gated MLPs). ``"terminal"``: they are leaves. Transcoder features always
                read the MLP's input.
            heads: ``"linearise"``: heads of layers without an SAE get in-edges of their own,
                through their frozen patterns.
            expand: ``"residual"``: where the residual stream that a target reads has an SAE, its
                in-edges come from that SAE's features, bias and error instead of the writers, which
                are the same stream split otherwise. ``{"residual": [3, -2]}``: at these source
                positions only, and from the writers at the others.
            residual: ``"terminal"``: features of residual SAEs are leaves. ``"recurse"``: they get
                in-edges from the writers at their position.
            node_budget: how many nodes get their own in-edges, most influential first; None:
                all that reach the target. Each target's ledger closes either way.
            edges_per_target: keep only the strongest edges of each target; the rest is summed in
                the ledger. None: all.
            memory_budget: bytes that the attribution may hold, besides model, SAEs and this run:
                what is written at each position, the edges, and work in flight. Where all edges
                would take more, only the strongest of each target are kept, with a warning; the
                rest is summed in the ledger, and influences are the same.
            progress: show a bar; None: for large models only, on a terminal. A function is called
                with the number of layers done and of all instead; what it raises passes through.
        """
        for name, value in (("node_budget", node_budget), ("edges_per_target", edges_per_target)):
            if value is not None and as_index(value, name) < (name == "edges_per_target"):
                raise InputError(f"{name}={value} is out of range")
        for name, value, known in (
            ("mlp", mlp, ("terminal", "linearise")),
            ("heads", heads, ("terminal", "linearise")),
            ("residual", residual, ("terminal", "recurse")),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r}; known: {', '.join(map(repr, known))}")
        if as_index(memory_budget, "memory_budget") < 1:
            raise InputError(f"memory_budget={memory_budget}: expected a number of bytes")
        if edges_per_target is not None:
            edges_per_target = int(as_index(edges_per_target, "edges_per_target"))  # no bool
        self._one  # noqa: B018 - refuses several prompts
        at = self._resolve_expand(expand)
        mask = np.zeros(self.tokens.shape[1], dtype=bool)
        mask[at] = True
        if target is None:
            targets, shares = self._top_logits()
        else:
            targets: list[Any] = list(target) if isinstance(target, list | tuple) else [target]
            shares = [1 / max(len(targets), 1)] * len(targets)
        if weights is not None:
            try:
                shares = [float(weight) for weight in weights]
            except (TypeError, ValueError, OverflowError):
                shares = []
            # Also false of NaN, and of infinity.
            sound = all(0 <= share < math.inf for share in shares) and sum(shares) > 0
            if len(shares) != len(targets) or not sound or sum(shares) == math.inf:
                raise InputError(
                    f"weights={weights!r}: expected {len(targets)} numbers, one for each target, "
                    "none negative"
                )
            shares = [share / sum(shares) for share in shares]
        if not targets:
            raise InputError("no target given")
        resolved = [self._resolve(one, mlp == "linearise") for one in targets]
        nodes = [node for node, _ in resolved]
        split = bool(at) or any(node.kind in RESIDUAL_KINDS for node in nodes)
        memory_budget = int(memory_budget)
        writers = self._writers_within(memory_budget // 2, split)
        if len(set(nodes)) < len(nodes):
            raise InputError(f"the same target twice: {', '.join(map(str, nodes))}")
        n_layers = len(self.frozen.layers)
        if progress is None:
            progress = n_layers >= _PROGRESS_LAYERS and sys.stderr.isatty()
        report = progress if callable(progress) else None
        hidden = not progress or report is not None
        with tqdm(total=n_layers, desc="attributing", disable=hidden, leave=False) as bar:

            def done(layer: int) -> None:
                bar.update()
                if report is not None:
                    report(n_layers - layer, n_layers)

            flow = sweep(
                self.frozen,
                writers,
                [root for _, root in resolved],
                shares,
                node_budget=node_budget,
                edges_per_target=edges_per_target,
                memory_budget=memory_budget,
                progress=done,
                mlps=self.linear_mlps if mlp == "linearise" and self._has_mlp else None,
                heads=heads == "linearise",
                residuals=self.residuals if split else None,
                checkpoints={depth: mask for depth in self.residuals} if mask.any() else None,
                recurse=residual == "recurse",
            )
        if flow.kept is not None and flow.kept != edges_per_target:
            warnings.warn(
                f"memory_budget={memory_budget} does not hold all edges: the {flow.kept} strongest "
                "of each target are kept, and the rest is summed in the ledger",
                stacklevel=2,
            )
        return Attribution(
            flow=flow,
            writers=writers,
            roots=dict(zip(flow.roots, nodes, strict=True)),
            tokens=self.token_strings,
            provenance={
                **self._provenance(),
                "target_weights": shares,
                "mlp": mlp,
                "heads": heads,
                "expand": expand if isinstance(expand, str) else {"residual": at},
                "residual": residual,
                "node_budget": node_budget,
                "edges_per_target": edges_per_target if flow.kept is None else flow.kept,
                **_directions(targets, nodes),
            },
            head_split=functools.partial(edges_by_head, self.frozen, writers),
            qk=self.qk,
            probabilities={
                number: self._probability(node)
                for number, node in zip(flow.roots, nodes, strict=True)
                if node.kind == "logit"
            },
            neuronpedia={
                (d.kind, layer): f"https://www.neuronpedia.org/{d.metadata['neuronpedia_id']}"
                for layer, d in self.lens.all_dictionaries()
                if d.metadata.get("neuronpedia_id")
            },
        )

    def graph(
        self,
        target: Target | Sequence[Target] | None = None,
        *,
        nodes: float = 0.8,
        edges: float = 0.98,
        max_nodes: int | None = None,
        mlp: Literal["terminal", "linearise"] = "terminal",
        heads: Literal["terminal", "linearise"] = "terminal",
        expand: Expand | Mapping[Expand, Sequence[int]] = "writers",
        residual: Literal["terminal", "recurse"] = "terminal",
        node_budget: int | None = 2000,
    ) -> nx.DiGraph[Any]:
        """``attribute(target).prune(nodes, edges).to_networkx()`` in one call."""
        att = self.attribute(
            target,
            mlp=mlp,
            heads=heads,
            expand=expand,
            residual=residual,
            node_budget=node_budget,
        )
        pruned = att.prune(nodes, edges, max_nodes)
        graph = pruned.to_networkx()
        graph.graph["pruning"] = {"nodes": nodes, "edges": edges, "max_nodes": max_nodes}
        return graph

    # -- scores ----------------------------------------------------------------------------------

    def _scores(self, layer: int) -> FrozenScores:
        """Queries and keys of a layer, kept for the next question."""
        if layer not in self._scores_by_layer:
            backend, capture = self.lens.backend, self._one.capture
            weights = need_scores(backend, layer, self.tokens.shape[1])
            self._scores_by_layer[layer] = freeze_scores(
                layer, self.frozen.layers[layer], weights, capture["resid_pre", layer][0]
            )
        return self._scores_by_layer[layer]

    @functools.cached_property
    def _scores_by_layer(self) -> dict[int, FrozenScores]:
        return {}

    @functools.cached_property
    def _clean_scores(self) -> dict[int, reading.CleanScores]:
        return {}

    def _checked_scores(self, layer: int, query: int) -> FrozenScores:
        """Scores that are known to give the model's own pattern at a query."""
        scores, g = self._scores(layer), self.lens.backend.geometry
        check_pattern(scores, query, g.dtype, f"{g.model_name} on {self.lens.backend.host}")
        return scores

    def page(
        self,
        target: Target | Sequence[Target] | None = None,
        *,
        nodes: float = 0.8,
        edges: float = 0.98,
        max_nodes: int | None = None,
        node_budget: int | None = 2000,
        **options: Any,
    ) -> Page:
        """:meth:`graph` as an HTML page with DFA, edges by head and QK pairs.

        ``run.page(target).save("graph.html")`` writes one offline file; a notebook shows the page.
        ``options`` are those of :func:`sae_attn_plugin.page`.
        """
        from sae_attn_plugin.graphs.html import page

        graph = self.graph(
            target, nodes=nodes, edges=edges, max_nodes=max_nodes, node_budget=node_budget
        )
        return page(self, graph, **options)

    # -- seeing it -------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None) -> Figure:
        """How many features are active, by layer and position.

        Args:
            ax: axes to draw into. None: a figure of its own, which notebooks show.

        Raises:
            InputError: a run of several prompts.
        """
        from sae_attn_plugin.plots import heat_map

        counts = self._one._active_counts()
        return heat_map(
            counts.to_numpy(dtype=float),
            [f"layer {layer}" for layer in counts.index],
            self.token_strings,
            title="Active features",
            name="features",
            ax=ax,
            signed=False,
        )

    def _active_counts(self) -> pd.DataFrame:
        """``[layer, position]``."""
        features = self.features()
        counts = pd.crosstab(features["layer"], features["position"])
        return counts.reindex(
            index=list(self.lens.dictionaries), columns=range(self.tokens.shape[1]), fill_value=0
        )

    def _repr_html_(self) -> str:
        from sae_attn_plugin import display

        if len(self) > 1:
            texts = [prompt or "token ids" for prompt in self.prompts]
            lengths = [self[i].tokens.shape[1] for i in range(len(self))]
            names = [f"run[{i}]" for i in range(len(texts))]
            frame = pd.DataFrame({"run": names, "prompt": texts, "tokens": lengths})
            return display.card(
                f"Run of {len(self)} prompts", [repr(self.lens)], display.table(frame, list(frame))
            )
        one = self[0]
        counts = one._active_counts().sum(axis=1)
        active = ", ".join(f"{layer}: {count}" for layer, count in counts.items())
        probabilities = one.logits[0, -1].double().softmax(-1)
        top = probabilities.topk(min(5, len(probabilities)))
        d_vocab = self.lens.backend.geometry.d_vocab
        frame = pd.DataFrame(
            {
                "next token": [
                    str(token_label(self.lens.tokenizer, number, d_vocab))
                    for number in top.indices.tolist()
                ],
                "probability": top.values.tolist(),
            }
        )
        return display.card(
            f"Run of {one.tokens.shape[1]} tokens",
            [str(self.lens.backend.geometry.model_name), self.lens.backend.host],
            display.coloured(one.token_strings, [0.0] * one.tokens.shape[1]),
            display.note(f"Active features by layer: {active}"),
            display.table(frame, list(frame), bars="probability", rows=5, neutral=True),
        )

    # -- resolving -------------------------------------------------------------------------------

    def _resolve_any_layer(self, layer: int) -> int:
        layer, n_layers = as_index(layer, "layer"), self.lens.backend.geometry.n_layers
        if not 0 <= layer < n_layers:
            raise InputError(f"layer {layer} is out of range: the model has {n_layers} layers")
        return layer

    @property
    def _has_mlp(self) -> bool:
        return self.lens.backend.geometry.has_mlp

    def resolve_layer(self, layer: int, kind: FeatureKind = "attn") -> int:
        """A layer with a dictionary whose features are of this kind."""
        if kind not in FEATURE_KINDS:
            raise InputError(f"unknown kind {kind!r}; known: {', '.join(FEATURE_KINDS)}")
        layer = as_index(layer, "layer")
        known = [number for number, d in self.lens.all_dictionaries() if d.kind == kind]
        if layer not in known:
            what = _WHAT[kind]
            there = ", ".join(map(str, known)) or "none"
            raise InputError(f"no {what} in layer {layer}; layers with one: {there}")
        return layer

    def dictionary(self, layer: int, kind: FeatureKind = "attn") -> Dictionary:
        """The dictionary of a layer whose features are of this kind."""
        layer = self.resolve_layer(layer, kind)
        if kind in RESIDUAL_KINDS:
            return self.lens.residual_saes[kind, layer]
        return (self.lens.dictionaries if kind == "attn" else self.lens.transcoders)[layer]

    def resolve_position(self, position: int) -> int:
        length, position = self.tokens.shape[1], as_index(position, "position")
        if not -length <= position < length:
            raise InputError(
                f"position {position} is out of range: the prompt has {length} tokens "
                f"(0..{length - 1}, or -{length}..-1 from the end)"
            )
        return position % length

    def resolve_feature(self, layer: int, feature: int, kind: FeatureKind = "attn") -> int:
        d_sae, feature = self.dictionary(layer, kind).d_sae, as_index(feature, "feature")
        if not 0 <= feature < d_sae:
            what = "transcoder" if kind == "tc" else "SAE"
            raise InputError(
                f"feature {feature} is out of range: the {what} of layer {layer} has {d_sae} "
                f"features (0..{d_sae - 1})"
            )
        return feature

    def _resolve_expand(self, expand: Expand | Mapping[Expand, Sequence[int]]) -> list[int]:
        """Source positions where terms of residual SAEs are read in the writers' stead."""
        everywhere = list(range(self.tokens.shape[1]))
        wanted = expand if isinstance(expand, Mapping) else {expand: everywhere}
        if not isinstance(expand, str | Mapping) or not wanted.keys() <= {"writers", "residual"}:
            raise InputError(
                f"expand={expand!r}; known: 'writers', 'residual', or one of them for some source "
                "positions, such as {'residual': [3, -2]}. Their sums are the same stream split in "
                "two ways, so a position has one"
            )
        places = {
            kind: [self.resolve_position(one) for one in given] for kind, given in wanted.items()
        }
        both = sorted(set(places.get("residual", ())) & set(places.get("writers", ())))
        if both:
            raise InputError(
                f"expand={dict(wanted)!r}: position {both[0]} is to be split both into writers and "
                "by the residual SAE; these are the same stream, so their sum would count it twice"
            )
        if "residual" in wanted and not self.lens.residual_saes:
            raise InputError(
                "expand='residual' without residual SAEs; give them as "
                "FeatureLens(..., residual_saes=)"
            )
        return sorted(set(places.get("residual", ())))

    def resolve_token(self, token: str | int) -> tuple[int, str]:
        d_vocab = self.lens.backend.geometry.d_vocab
        number = single_token(self.lens.tokenizer, token, d_vocab)
        return number, quote(token_label(self.lens.tokenizer, number, d_vocab))

    def _resolve(
        self, target: Target, linearised: bool = False
    ) -> tuple[Node, StreamReader | ScoreReader | Feature]:
        run = self.frozen
        if isinstance(target, Feature):
            kind = target.kind
            layer, position = (
                self.resolve_layer(target.layer, kind),
                self.resolve_position(target.position),
            )
            feature = self.resolve_feature(layer, target.feature, kind)
            if kind == "mlp_sae" and not linearised:
                raise InputError(
                    "a feature of an SAE on hook_mlp_out is a target only with mlp='linearise': it "
                    "reads what the MLP computes"
                )
            node = Node(kind, position, layer=layer, feature=feature)
            return node, Feature(layer, feature, position, kind)
        if isinstance(target, HeadScore):
            return self._resolve_score(target)
        if not isinstance(target, Logit | LogitDiff | Direction):
            raise InputError(
                "expected a Feature, Logit, LogitDiff, Direction or HeadScore as target, got "
                f"{target!r}"
            )
        position = self.resolve_position(target.position)
        bias = run.b_U
        if isinstance(target, Logit):
            token, label = self.resolve_token(target.token)
            offset = 0.0 if bias is None else float(bias[token])
            node = Node("logit", position, label=label)
            reader = logit_reader(run, run.W_U[:, token], position, offset)
            return node, _measured(reader, float(self._logits([token], position)[0]))
        if isinstance(target, LogitDiff):
            correct, first = self.resolve_token(target.correct)
            wrong, second = self.resolve_token(target.wrong)
            if correct == wrong:
                raise InputError(f"LogitDiff of the token {first} with itself is always 0")
            direction = run.W_U[:, correct].to(run.dtype) - run.W_U[:, wrong].to(run.dtype)
            offset = 0.0 if bias is None else float(bias[correct] - bias[wrong])
            node = Node("logit_diff", position, label=f"{first}-{second}")
            first_logit, second_logit = self._logits([correct, wrong], position)
            measured = float(first_logit - second_logit)
            return node, _measured(logit_reader(run, direction, position, offset), measured)
        d_model = run.embed.shape[1]
        if not isinstance(target.vector, Tensor):
            raise InputError(
                f"Direction: expected a vector [{d_model}], got a {type(target.vector).__name__}"
            )
        if tuple(target.vector.shape) != (d_model,):
            raise InputError(
                f"Direction: expected a vector [{d_model}], got {list(target.vector.shape)}"
            )
        if not torch.isfinite(target.vector).all():
            raise InputError("Direction: the vector holds NaN or infinity")
        node = Node("direction", position, label=quote(target.name))
        return node, logit_reader(run, target.vector.to(run.embed.device), position)

    def _resolve_score(self, target: HeadScore) -> tuple[Node, ScoreReader]:
        layer, head = self._resolve_any_layer(target.layer), as_index(target.head, "head")
        query, key = self.resolve_position(target.query), self.resolve_position(target.key)
        scores = self._checked_scores(layer, query)
        reader = score_reader(scores, head, query, key, target.side)
        label = None if target.side == "both" else target.side
        return Node("score", query, layer=layer, head=head, key=key, label=label), reader

    def _logits(self, tokens: list[int], position: int) -> Float[Tensor, " token"]:
        """Logits of some tokens as the model computed them, before any soft-cap, in float64."""
        found = uncapped_logits(self.lens.backend, self.capture.values, tokens, position)
        return found[0].double()

    def _probability(self, node: Node) -> float:
        """Of the token of a logit node, as the model returns it."""
        (token,) = unquote(node.label or "")
        return float(
            self.logits[0, node.position].double().softmax(-1)[self.resolve_token(token)[0]]
        )

    def _top_logits(self) -> tuple[list[Target], list[float]]:
        probabilities = self.logits[0, -1].float().softmax(-1)
        top = probabilities.topk(min(_TOP_LOGITS, len(probabilities)))
        # the first token is always in; one more is while the sum before it is short of the share
        before = top.values.cumsum(0) - top.values
        count = int((before < _TOP_PROBABILITY).sum())
        weights = (top.values[:count] / top.values[:count].sum()).tolist()
        return [Logit(int(token)) for token in top.indices[:count]], weights

    def _provenance(self) -> Mapping[str, Any]:
        about = dict(self.lens.provenance)
        versions = about.pop("versions")
        about |= {"prompt": self.prompts[0], "token_ids": self.tokens[0].tolist()}
        if self.prompts[0] is not None:
            about["prepend_bos"] = self.lens.prepend_bos
        return about | {"versions": versions}


class UnequalRun(Run):
    """Runs of prompts of unequal length, side by side; ``run[i]`` is the run of one.

    ``tokens``, ``logits`` and ``capture`` would need padding and are refused.
    """

    def __init__(self, lens: FeatureLens, runs: Sequence[Run], roles: Roles | None = None) -> None:
        self.lens = lens
        self.prompts: tuple[str | None, ...] = tuple(run.prompts[0] for run in runs)
        self.roles: Roles = roles or Roles()
        self._runs = tuple(runs)

    def pick(self, members: Sequence[int]) -> Run:
        runs, roles = [self._runs[i] for i in members], self.roles.pick(list(members))
        if len({run.tokens.shape[1] for run in runs}) > 1:
            return UnequalRun(self.lens, runs, roles)
        first = runs[0].capture
        values = {site: torch.cat([r.capture.values[site] for r in runs]) for site in first.values}
        tokens = torch.cat([run.tokens for run in runs])
        return Run(self.lens, Capture(tokens, values), tuple(run.prompts[0] for run in runs), roles)

    @property
    def lengths(self) -> list[int]:
        return [run.tokens.shape[1] for run in self._runs]

    @property
    def capture(self) -> Capture:  # type: ignore[override]
        lengths = sorted({run.tokens.shape[1] for run in self._runs})
        raise InputError(
            f"the prompts of this run have {lengths[0]} to {lengths[-1]} tokens, so they make no "
            "rectangle; pick one: run[i]"
        )

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: int) -> Run:
        return self._runs[index]

    def __repr__(self) -> str:
        lengths = ", ".join(str(run.tokens.shape[1]) for run in self._runs)
        return f"Run of {len(self)} prompts, {lengths} tokens"


def _token_rows(dataset: Dataset, members: Sequence[int] | None = None) -> list[list[int]]:
    """Unpadded token ids of some prompts of a data set."""
    chosen = range(len(dataset)) if members is None else members
    lengths = dataset.lengths.tolist()
    return [dataset.tokens[i, : lengths[i]].tolist() for i in chosen]


def _directions(targets: Sequence[Target], nodes: Sequence[Node]) -> dict[str, Any]:
    """Vectors of targets, which their names do not tell."""
    vectors = {
        str(node): target.vector.tolist()
        for target, node in zip(targets, nodes, strict=True)
        if isinstance(target, Direction)
    }
    return {"directions": vectors} if vectors else {}


def _measured(reader: StreamReader, value: float) -> StreamReader:
    """The value of a logit target is what the model itself computed."""
    return StreamReader(reader.vector, reader.position, reader.constant, value)


@functools.cache
def _versions() -> dict[str, str]:
    names = ("sae-attn-plugin", "sae-lens", "transformer-lens", "nnsight", "torch", "transformers")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
