"""What is each head for? Feature families and the table of heads, from one pass over text.

Offline, on the demo model in the package. On GPT-2, with your own text, change the marked line to

    lens = sap.FeatureLens(sap.load_model("gpt2"), "gpt2-small-hook-z-kk")

and give `sap.survey` that text: a file, a data set on the hub, or rows of token ids.
"""

# %% One pass over text, for every feature of every layer
import tempfile

import torch

import sae_attn_plugin as sap
from sae_attn_plugin.demo.language import held_out_rows

lens = sap.demo.load()  # the line to change for GPT-2
text = torch.tensor(held_out_rows(96, 48, seed=0))
survey = sap.survey(lens, text, f"{tempfile.mkdtemp()}/survey", sample=40, progress=False)

# %% Which features belong to which families, by tests on a random sample of their firings
families = sap.studies.families(survey)
print(families.table.pivot(index="family", columns="layer", values="share").round(3))
members = families.tables["members"]
induction = members.query("family == 'induction'")
print(induction[["layer", "feature", "score", "baseline", "token", "prefix", "next"]].head(8))

# %% Where a criterion fails: firings of members that do not meet it, in context
wrong = families.tables["false_positives"]
print(wrong[["family", "feature", "before", "next", "source_token"]].head(6).to_string())

# %% What the strongest firings alone would have said
print(families.tables["strongest"])

# %% The table of heads: do decoder norms and measured attribution name the same features?
heads = sap.studies.heads(survey, lens=lens, families=families)
columns = ["layer", "head", "dfa_share", "agreement", "overlap", "score_dfa", "families"]
print(heads.table[columns].round(2).to_string())
mine = heads.tables["features"].query("layer == 0 and head == 7 and by == 'dfa'")
print(mine[["feature", "dfa_share", "decoder_share", "fires", "promotes"]].to_string())

# %% How much does "monosemantic" depend on where the line is drawn?
print(heads.tables["sensitivity"].pivot(index=["by", "top"], columns="threshold", values="share"))
heads.plot().savefig("heads.png")
families.plot().savefig("families.png")

# %% Are the tests right? Features of known families, planted among decoys
planted = sap.demo.families.plant(seed=0, noise=0.5, rows=32)
known = sap.survey(
    planted.lens(), planted.rows, f"{tempfile.mkdtemp()}/planted", sample=40, progress=False
)
print(sap.demo.families.compare(planted, sap.studies.families(known)))
