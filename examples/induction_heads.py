"""Which heads do induction, and how many repeated tokens do they need?

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")
"""

# %% Attention from a repeated token to what followed its earlier copy
import sae_attn_plugin as sap
from sae_attn_plugin.tasks import InductionDataset, head_scores

lens = sap.demo.load()  # the line to change for GPT-2
repeats = InductionDataset.random_repeats(32, lens.tokenizer, seed=0)
scores = head_scores(lens, repeats)
print(scores["induction"].nlargest(6))
print(scores["previous_token"].nlargest(3))

# %% Long and short prefix: 1 to 5 tokens repeated among distinct random ones
heads = list(scores["induction"].nlargest(2).index)
study = sap.studies.prefix(lens, heads, n=20, prefix_lengths=(1, 2, 3, 5), progress=False)
print(study.tables["sweep"])
study.plot().savefig("prefix.png")
study.save("prefix.json")

# %% Is a head needed? Its output removed
sets = {f"head {layer}.{head}": [sap.AblateHead(layer, head)] for layer, head in heads}
found = lens.intervene_dataset(repeats, sets)
for name, result in found.items():
    print(name, "log-probability of the repeated tokens changes by", result.interval())
