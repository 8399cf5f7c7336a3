"""Direct feature attribution: where a feature's pre-activation comes from, by head and source.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")
"""

# %%
import sae_attn_plugin as sap

lens = sap.demo.load()  # the line to change for GPT-2
run = lens.run("When John and Mary went to the store, John gave a drink to")

# %% The strongest feature of each layer at the last token
last = run.tokens.shape[1] - 1
active = run.features(position=last).sort_values("activation", ascending=False)
strongest = active.drop_duplicates("layer").sort_values("layer")
print(strongest)

# %% One of them, split by head and source position
layer, feature = (int(strongest[name].iloc[1]) for name in ("layer", "feature"))
dfa = run.dfa(layer, feature, position=last)
print(dfa.to_frame())  # a row per source position, a column per head
print("by head", dfa.by_head.tolist())
for token, value in zip(run.token_strings, dfa.by_source.tolist(), strict=True):
    print(f"{token!r:>12} {value:+.3f}")

# %% The split is exact: its sum and the constant are the pre-activation
total = float(dfa.by_head_and_source.sum() + dfa.constant)
print(f"sum {total:.6f}, model {float(dfa.pre_activation):.6f}")
assert abs(total - float(dfa.pre_activation)) < 1e-3

# %% A picture: heads by source positions
dfa.plot().savefig("dfa.png")

# %% Which heads the layer's features belong to, from the weights alone
print(lens.head_attribution(layer).head())
