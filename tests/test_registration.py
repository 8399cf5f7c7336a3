"""What importing the package adds to sae_lens, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import sae_attn_plugin as sap
from sae_attn_plugin import pretrained
from sae_attn_plugin.registration import DEMO_RELEASE


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What sae_lens imports takes most of the time of each process: here once, and then a fork for each.
_FORKS = """
import json, os, sys
import datasets, torch, transformer_lens, transformers
assert not [name for name in sys.modules if name.partition(".")[0] in ("sae_lens", PLUGIN)]
for code in json.loads(sys.stdin.read()):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            exec(code, {"__name__": "__main__"})
            print()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, code
    print(END)
""".replace("PLUGIN", repr("sae_attn_plugin"))


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """The last line that each program prints which meets sae_lens for the first time."""
    end = "-- end of a program --"
    script = f"END = {end!r}\n{_FORKS}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], input=json.dumps(list(PROGRAMS.values())),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.split(end)[: len(PROGRAMS)]
    return {name: text.strip().splitlines()[-1] for name, text in zip(PROGRAMS, said, strict=True)}


REGISTERS = """
from sae_lens import TrainingSAE, registry
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as directory
print(sorted(directory()["sae-attn-demo"].saes_map), len(registry.SAE_TRAINING_CLASS_REGISTRY))
"""


@pytest.mark.parametrize("first", ["package first", "saes first"])
def test_registers_whatever_comes_first(printed: dict[str, str], first: str) -> None:
    expected = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    n_training = len(SAE_TRAINING_CLASS_REGISTRY)
    assert printed[first] == f"{expected} {n_training}"


# Everything of sae_lens, and objects built before, against the same after the import.
UNCHANGED = """
import sys, json, torch, sae_lens, sae_lens.evals
from sae_lens import registry, SAE, StandardSAE, StandardSAEConfig, TrainingSAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as directory
from sae_lens.saes.sae import SAEMetadata

def everything():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "sae_lens":
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__.startswith("sae_lens"):
                    found.update({(name, key, k): v for k, v in vars(value).items()})
    return found

def made():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=12, d_sae=20, reshape_activations="hook_z",
        metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z", model_name="m")))
    config = dict(sae_lens.StandardTrainingSAEConfig(d_in=12, d_sae=20).to_dict())
    return sae, TrainingSAE.from_dict(config)

def use(saes):
    x = torch.ones(2, 3, 3, 4)
    plain, training = saes
    out = [plain.encode(x), plain(x), training(x.flatten(-2))]
    return [t.detach() for t in out], plain.cfg.to_dict(), training.cfg.to_dict()

tables = [directory(), loaders.NAMED_PRETRAINED_SAE_LOADERS, registry.SAE_CLASS_REGISTRY,
          loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, registry.SAE_TRAINING_CLASS_REGISTRY]
before, old_tables = everything(), [dict(table) for table in tables]
copies = json.dumps([vars(lookup) for lookup in directory().values()], default=str)
early = made()
# The trap is there before, and stays as it is.
lost = made()[0]
try: lost.decode(torch.ones(1, 20)); raise SystemExit("no trap")
except AttributeError: pass

import sae_attn_plugin
sae_attn_plugin.register(); sae_attn_plugin.register()

assert everything().keys() >= before.keys()
changed = [key for key, value in everything().items() if key in before and value is not before[key]]
assert not changed, changed
late = made()
assert [type(x) for x in early] == [type(x) for x in late]
for one, other in zip(use(early)[0], use(late)[0]):
    assert torch.equal(one, other)
assert use(early)[1:] == use(late)[1:]
try: made()[0].decode(torch.ones(1, 20)); raise SystemExit("changed")
except AttributeError: pass
for old, new in zip(old_tables, tables):
    assert all(new[name] is old[name] for name in old)
    assert list(new)[: len(old)] == list(old)
kept = [vars(directory()[name]) for name in old_tables[0]]
assert json.dumps(kept, default=str) == copies
directory.cache_clear()
assert set(directory()) == set(tables[0])
print([sorted(set(new) - set(old)) for old, new in zip(old_tables, tables)])
"""


PROGRAMS = {
    "package first": "import sae_attn_plugin as s; s.releases(); s.register()" + REGISTERS,
    "saes first": "from sae_attn_plugin.saes import AttentionSAE" + REGISTERS,
    "unchanged": UNCHANGED,
}


def test_importing_changes_nothing_for_code_that_does_not_use_it(printed: dict[str, str]) -> None:
    added = printed["unchanged"]
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
