"""The same graph from TransformerLens, nnsight, and nnsight's remote form.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    loaded, saes = {host: sap.load_model("gpt2", host) for host in HOSTS}, "gpt2-small-hook-z-kk"
"""

# %% One model, two hosts
import sae_attn_plugin as sap

HOSTS = ("transformer_lens", "nnsight")
# the line to change for GPT-2:
loaded, saes = {host: sap.demo.load_model(host) for host in HOSTS}, sap.demo.load_saes()
prompt = "When John and Mary went to the store, John gave a drink to"
target = sap.LogitDiff(" Mary", " John")

graphs = {}
for host, model in loaded.items():
    lens = sap.FeatureLens(model, saes)
    graphs[host] = lens.run(prompt).graph(target)
    print(host, graphs[host])

# %% Are they the same?
print(sap.compare_graphs(graphs["transformer_lens"], graphs["nnsight"]))
assert sap.graphs_equal(graphs["transformer_lens"], graphs["nnsight"])

# %% A remote run, serialised as for NDIF and run here; remote=True sends it away
lens = sap.FeatureLens(loaded["nnsight"], saes, remote="local")
run = lens.run(prompt)
print(run.attribute(target).worst_residual)

# %% Beside your own traces: the model is an ordinary nnsight model
import torch  # noqa: E402

model = loaded["nnsight"]
seen = {}
with torch.no_grad(), model.trace(run.tokens):
    seen["z"] = model.transformer.h[1].attn.c_proj.input
z = seen["z"].unflatten(-1, (-1, lens.dictionaries[1].d_head))  # split by head
active = lens.dictionaries[1].encode(z[0])
print("active at the last token:", active.feature[active.position == len(z[0]) - 1].tolist())
