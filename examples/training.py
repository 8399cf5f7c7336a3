"""Train attention-output SAEs, measure them and use them.

Offline, with a few steps on the demo model, so that it takes seconds. For GPT-2, change the marked
line to

    model = sap.hooked(sap.load_model("gpt2", "nnsight"))

and give it more text: ``data="openwebtext.jsonl"`` with ``training_tokens`` in the millions.
"""

# %% Text to train on: here sentences of the task
import sae_attn_plugin as sap
from sae_attn_plugin.training import recipe, train

model = sap.hooked(sap.demo.load_model("nnsight"))  # the line to change for GPT-2
sentences = sap.tasks.IOIDataset(256, model.tokenizer, seed=0, prepend_bos=True)
tokens = sentences.tokens[:, : int(sentences.lengths.min())]
held_out = tokens[-32:]

# %% A recipe per layer, all from one pass over the model
recipes = [
    recipe(
        model,
        layer,
        k=12,
        d_sae=512,
        context_size=tokens.shape[1],
        training_tokens=20_000,
        n_batches_in_buffer=256,
    )
    for layer in (0, 1)
]
folders = train(recipes, model, tokens[:-32], out="saes", progress=False)
print(folders)

# %% How good are they?
lens = sap.FeatureLens(model, "saes")
print(sap.evaluate(lens, held_out, progress=False))

# %% They attribute like any other
att = lens.run(tokens[:1]).attribute()  # the likeliest next tokens
print(att.worst_residual)
assert att.worst_residual < 1e-5

# %% What was saved is a plain sae_lens SAE, for anyone who does not have this package
from sae_lens import SAE  # noqa: E402

plain = SAE.load_from_disk(str(folders[0]))
print(plain.cfg.architecture(), plain.cfg.d_in, plain.cfg.d_sae)
