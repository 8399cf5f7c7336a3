"""Why does a head look where it looks? Its score, feature by feature.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")
"""

# %% The head that looks hardest at one token from the last one
import sae_attn_plugin as sap

lens = sap.demo.load()  # the line to change for GPT-2
run = lens.run("When John and Mary went to the store, John gave a drink to")
query = run.tokens.shape[1] - 1
patterns = [layer.pattern for layer in run.frozen.layers]
weight, layer, head, key = max(
    (float(pattern[head, query, key]), layer, head, key)
    for layer, pattern in enumerate(patterns)
    if layer > 0
    for head in range(len(pattern))
    for key in range(1, query)
)
print(f"head {layer}.{head} looks at {run.token_strings[key]!r} with weight {weight:.3f}")

# %% Its score is a sum over pairs of writers
qk = run.qk(layer, head, query, key)
print(qk)
print(qk.top(8))
print(qk.by_kind)
assert qk.relative_residual < 1e-4  # the terms add up to the model's own score

# %% What makes it look there rather than elsewhere
print(qk.top(8, relative=True))
qk.plot().savefig("qk.png")

# %% The score as a target of its own: recursed down to the tokens
att = run.attribute(sap.HeadScore(layer, head, query, key, side="both"))
print(att.ledger)
for path in sap.strongest_paths(att.prune(nodes=0.6).to_networkx(), n=5):
    print(path)
