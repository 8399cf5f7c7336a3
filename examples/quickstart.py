"""One prompt, from its active features to a graph that is tested on the model.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")

Cells start with ``# %%`` (VS Code, PyCharm, Jupytext), or run the whole: python quickstart.py
"""

# %% A model seen through its attention-output SAEs
import sae_attn_plugin as sap

lens = sap.demo.load()  # the line to change for GPT-2
run = lens.run("When John and Mary went to the store, John gave a drink to")
print(run)

# %% What did attention compute at the last token?
last = run.tokens.shape[1] - 1
print(run.features(position=last).nlargest(8, "activation"))

# %% Through which path did it reach the logit difference?
target = sap.LogitDiff(" Mary", " John")
att = run.attribute(target)
print(att.ledger.head(3))  # in_sum + constant + pruned = value
print("worst ledger residual", att.worst_residual)

graph = att.prune(nodes=0.8, edges=0.98).to_networkx()
for path in sap.strongest_paths(graph, n=5):
    print(path)

# %% Is it true? Every edge against the removal of its source on the model
validation = sap.validate(graph, lens, max_sources=10)
print(validation)

# %% And with everything live, the most influential feature removed
node = sap.Node.parse(att.nodes.query("kind == 'attn'").influence.idxmax())
assert node.layer is not None
assert node.feature is not None
result = lens.intervene(run, [sap.AblateFeature(node.layer, node.feature, node.position)])
print(node, "removed: logit difference changes by", float(result.effect(target)))

# %% Keep it, and look at it in a browser
sap.save(graph, "quickstart.json")
run.page(target, max_nodes=100).save("quickstart.html")
