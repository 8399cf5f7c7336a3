"""What importing the package adds to sae_lens, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import sae_attn_plugin as sap
from sae_attn_plugin import pretrained
from sae_attn_plugin.registration import DEMO_RELEASE


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import sae_lens, sae_attn_plugin",
        "import sae_attn_plugin, sae_lens",
        "import sae_attn_plugin, sae_lens; sae_attn_plugin.register(); sae_attn_plugin.register()",
    ],
)
def test_registers_in_either_order(imports: str) -> None:
    code = f"""
{imports}
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as directory
print(sorted(directory()["{DEMO_RELEASE}"].saes_map))
"""
    expected = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    assert in_new_process(code).strip().splitlines()[-1] == str(expected)


def test_every_entry_of_sae_lens_is_kept() -> None:
    code = """
import sae_lens
from sae_lens import registry
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as directory
tables = [directory(), loaders.NAMED_PRETRAINED_SAE_LOADERS, registry.SAE_CLASS_REGISTRY,
          loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, registry.SAE_TRAINING_CLASS_REGISTRY]
before = [dict(table) for table in tables]
import sae_attn_plugin
sae_attn_plugin.register()
for old, new in zip(before, tables):
    assert all(new[name] is old[name] for name in old)
print([sorted(set(new) - set(old)) for old, new in zip(before, tables)])
"""
    added = in_new_process(code).strip().splitlines()[-1]
    training = [f"sae_attn_{name}" for name in sorted(sap.saes.ARCHITECTURES)]
    releases = sorted(pretrained.added(get_pretrained_saes_directory()))
    again = [name for name in get_pretrained_saes_directory() if name.endswith("-hook-z")]
    loaders = ["sae_attn_plugin", "sae_attn_plugin_paper"]
    assert len(again) == 18
    assert added == str([sorted({*releases, *again}), loaders, [], loaders, training])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = """
import sys, sae_attn_plugin
print([name for name in ("torch", "sae_lens", "transformers", "pandas") if name in sys.modules])
"""
    assert in_new_process(code).strip() == "[]"


def test_the_demo_release_loads_as_any_other() -> None:
    for sae_id in get_pretrained_saes_directory()[DEMO_RELEASE].saes_map:
        sae = SAE.from_pretrained(DEMO_RELEASE, sae_id)
        shipped = SAE.load_from_disk(sap.demo.SAES_PATH / sae_id)
        assert sae.cfg.metadata.hook_name == sae_id
        assert sae.cfg.reshape_activations == "hook_z"
        for name, tensor in shipped.state_dict().items():
            assert torch.equal(sae.state_dict()[name], tensor)


def test_a_release_gives_the_same_lens_as_its_folder() -> None:
    model = sap.demo.load_model()
    prompt = sap.demo.ioi_prompt()
    one = sap.FeatureLens(model, DEMO_RELEASE).run(prompt).features()
    other = sap.FeatureLens(model, sap.demo.SAES_PATH).run(prompt).features()
    assert one.equals(other)
    assert len(one) > 0


def test_an_unknown_sae_of_the_release() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_z"):
        SAE.from_pretrained(DEMO_RELEASE, "blocks.9.attn.hook_z")


def test_every_public_name_loads() -> None:
    for name in sap.__all__:
        assert getattr(sap, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        sap.no_such_name  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
