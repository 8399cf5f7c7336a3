"""Features that say "X is next by induction", and how well they say it.

Offline, on the demo model in the package. On GPT-2, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")

and ``windows`` to token ids of text, ``[window, position]``.
"""

# %% Windows of text: here of the demo model's own language, with repeats
import torch

import sae_attn_plugin as sap
from sae_attn_plugin.demo.language import held_out_rows

lens = sap.demo.load()  # the line to change for GPT-2
windows = torch.tensor(held_out_rows(96, 48, seed=0))

# %% Every feature of a layer against the text: does it fire where X would be next?
study = sap.studies.induction_feature(lens, windows, layer=1, min_fires=10, progress=False)
print(study.tables["features"].head(8))
print(study.tables["feature"].T)

# %% Where it fires without reason, and where it should have fired
for row in study.tables["examples"].itertuples():
    print(row)

# %% Precision by strength of activation
print(study.tables["quantiles"])
study.plot().savefig("induction_feature.png")
