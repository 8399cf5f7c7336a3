"""The circuit of indirect object identification, over many prompts.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")
"""

# %% Prompts whose parts are known, and how well the model does
import sae_attn_plugin as sap
from sae_attn_plugin.tasks import IOIDataset, ioi_scores

lens = sap.demo.load()  # the line to change for GPT-2
ioi = IOIDataset(8, lens.tokenizer, seed=0, order="mixed", prepend_bos=lens.prepend_bos)
abc = ioi.abc()  # three different names: no right answer
print(ioi.samples[0])
print(ioi_scores(lens, ioi))
print(ioi_scores(lens, abc))

# %% One graph for all: positions that play the same role are laid on each other
average = lens.attribute_many(ioi, max_nodes=100)
print(average.edges.sort_values("mean", key=abs, ascending=False).head(15))

# %% Which layers write what matters at S2 and at END?
layers = range(lens.backend.geometry.n_layers)
sets = {
    f"layer {layer} at {role}": [
        sap.PatchSite("attn_out", layer, role, to=sap.From("abc", position=role))
    ]
    for layer in layers
    for role in ("S2", "END")
}
found = lens.intervene_dataset(ioi, sets, sources={"abc": abc})
for name, result in found.items():
    print(name, result.interval())

# %% One prompt's graph, and its test on the model
target = sap.LogitDiff(int(ioi.correct[0]), int(ioi.wrong[0]))
graph = lens.run(ioi.texts[0]).graph(target, max_nodes=60)
print(sap.validate(graph, lens, max_sources=10))
sap.draw(graph, "ioi.png")
