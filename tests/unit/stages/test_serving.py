"""All users of a run as vLLM loads them, and one user's whole model.

vLLM itself cannot run here, so its rules are written down: what its resolver asks of a folder
(vllm/plugins/lora_resolvers/filesystem_resolver.py), its ranks (vllm/config/lora.py), and what its
loader takes (vllm/lora/peft_helper.py; names of weights in vllm/lora/lora_model.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import InputError
from tasks.export import Finished, Served, export, max_lora_rank, merged_model, vllm_folders
from tasks.lora.adapters import read_peft
from tasks.report.files import write_run
from tasks.results.run import Run
from tasks.tools.main import main
from tests.unit.lora.helpers import delta
from tests.unit.lora.test_architectures import base_of
from tests.unit.lora.test_base import gpt2
from tests.unit.stages.pipeline import LORA, OPTIONS, ROLES, run
from tests.unit.stages.users import user

NAMES = ["few-0", "few-2", "few/1"]
USERS = ROLES | {"few_shot": [user(name, 4, queries=2) for name in NAMES]}
WEIGHT = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight")
# Of a Llama: `packed_modules_mapping` and the supported modules of vLLM's LlamaForCausalLM.
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def saved(place: Path) -> Run:
    """Merged of two anchors of rank 3, a stacked LoRA of rank 2; the base has one of rank 3."""
    adapt = {"enabled": True, "train_on": "profile", **LORA, "rank": 3, "alpha": 3.0}
    adapt |= {"target_modules": "all-linear"}
    cell = run(place, USERS, methods=["base", "mta"], base={"task_adapt": adapt})
    made = Run(id="one", name="calm-hare", date="2026-11-29 07:00", report="calm-hare", config={},
               cells=(cell,))  # fmt: skip
    write_run(made)
    return made


def resolved(folder: Path, name: str, served: str) -> bool:
    """What vLLM's resolver asks of a folder before it loads it."""
    config = json.loads((folder / name / "adapter_config.json").read_text())
    return bool(config["peft_type"] == "LORA" and config["base_model_name_or_path"] == served)


def test_every_user_is_a_folder_that_vllm_loads(saved: Run, tmp_path: Path) -> None:
    """Rank 3 + 2 x 3 + 2 = 11 of the whole is cut to 8; names, ranks and weights as vLLM asks."""
    found = list(vllm_folders(Finished(saved), tmp_path / "out", rank=8, name="/models/mine"))
    assert [one.user for one in found if isinstance(one, Served)] == NAMES
    for one in found:
        assert isinstance(one, Served)
        assert resolved(tmp_path / "out", one.folder.name, "/models/mine")
        config = json.loads((one.folder / "adapter_config.json").read_text())
        assert config["r"] == 8 <= max_lora_rank(8)
        assert not config["use_dora"]
        assert not config["modules_to_save"]
        assert config["bias"] == "none"
        weights = load_file(one.folder / "adapter_model.safetensors")
        for name, weight in weights.items():
            match = WEIGHT.fullmatch(name)
            assert match
            assert match[1] in MODULES
            assert 8 in weight.shape
        about = json.loads((one.folder / "mta.json").read_text())
        assert (about["user"], about["max_lora_rank"]) == (one.user, "8")
        assert float(about["error"]) == pytest.approx(one.error, abs=1e-6)
    # A name that is no folder's is changed, and the user is named in the folder.
    assert found[2].folder.name.startswith("few-1-")  # type: ignore[union-attr]
    assert len({one.folder for one in found if isinstance(one, Served)}) == 3


def test_what_is_lost_is_that_of_an_svd(saved: Run, tmp_path: Path) -> None:
    """By torch's SVD of each layer's whole update: what is cut are the singular values beyond."""
    list(vllm_folders(Finished(saved), tmp_path / "small", rank=2))
    export(Finished(saved), "few-0", tmp_path / "whole")
    whole, small = (read_peft(tmp_path / name) for name in ("whole", "small/few-0"))
    assert whole.rank == 11
    lost = total = 0.0
    for layer in whole.layers:
        u, s, vt = torch.linalg.svd(delta(whole, layer), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        torch.testing.assert_close(delta(small, layer), best, rtol=1e-4, atol=1e-6)
        lost, total = lost + float((s[2:] ** 2).sum()), total + float((s**2).sum())
    about = json.loads((tmp_path / "small" / "few-0" / "mta.json").read_text())
    assert float(about["error"]) == pytest.approx((lost / total) ** 0.5, abs=1e-5)
    # Where the rank is enough nothing is lost.
    for one in vllm_folders(Finished(saved), tmp_path / "enough", rank=16):
        assert isinstance(one, Served)
        assert one.error == 0.0


def logits(model: Any, tokenizer: Any) -> Tensor:
    ids = tokenizer("description: a film tag:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_stock_peft_loads_them_and_the_merged_model_is_the_same(
    saved: Run, place: Path, tmp_path: Path
) -> None:
    """`merge_and_unload` of the exported LoRA, and the folder of the whole model."""
    list(vllm_folders(Finished(saved), tmp_path / "all", rank=16))
    merged_model(Finished(saved), "few-2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    plain = logits(base, tokenizer)
    stock: Any = PeftModel.from_pretrained(base, str(tmp_path / "all" / "few-2"))
    wanted = logits(stock.merge_and_unload(), tokenizer)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-2
    assert json.loads((tmp_path / "model" / "mta.json").read_text())["user"] == "few-2"


def test_the_command(saved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says of each user what is lost, and how vLLM is started; refusals are one line each."""
    given = ["export", "--run", saved.name, "--to"]
    everyone = ["--all", "--format", "vllm"]
    assert main([*given, str(tmp_path / "a"), *everyone, "--rank", "4"]) == 0
    *users, served = capsys.readouterr().out.splitlines()
    assert len(users) == 3
    assert re.fullmatch(rf"{tmp_path}/a/few-0: few-0, \d+\.\d\d% of the update lost", users[0])
    assert f"VLLM_LORA_RESOLVER_CACHE_DIR={tmp_path}/a vllm serve model " in served
    assert served.endswith("--enable-lora --max-lora-rank 8")
    assert main([*given, str(tmp_path / "m"), "--user", "few-0", "--format", "merged"]) == 0
    capsys.readouterr()
    for more, words in (
        (["--user", "few-0", "--format", "vllm"], "give --user ID, or --all with --format vllm"),
        (["--all"], "give --user ID, or --all with --format vllm"),
        ([], "give --user ID, or --all with --format vllm"),
        ([*everyone, "--rank", "513"], "--rank 513: vLLM's ranks are 1 to 512"),
        (["--user", "none", "--format", "merged"], "--user none: no few-shot user of the run"),
    ):
        assert main([*given, str(tmp_path / "b"), *more]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "b").exists()
    assert main([*given, str(tmp_path / "a"), *everyone]) == 2
    assert "holds something already" in capsys.readouterr().err
    # Who loses too much gets no folder, and is named.
    assert main([*given, str(tmp_path / "t"), *everyone, "--rank", "1", "--tolerance", "0.01"]) == 2
    assert capsys.readouterr().err.count("more than --tolerance 0.01; raise --rank") == 3
    assert list((tmp_path / "t").iterdir()) == []


def test_sixty_users(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rank 26 (three anchors of 8, and 2) cut to 16: each loss is said, and PEFT loads all."""
    everyone = [user(f"few-{n:02}", 3, queries=1) for n in range(60)]
    short = {**LORA, "epochs": 1}
    cell = run(
        place, ROLES | {"few_shot": everyone}, methods=["mta"],
        anchors=OPTIONS["anchors"] | {"signature_vocabulary": 32},
        meta_lora={"rank": 8, "alpha": 8.0, **short},
        stacking={"rank": 2, "alpha": 4.0, **short},
        fusion={"top_m": 3, "weights": "cosine"},
    )  # fmt: skip
    made = Run(id="sixty", name="sixty", date="", report="sixty", config={}, cells=(cell,))
    write_run(made)
    to, given = tmp_path / "all", ["export", "--run", "sixty", "--all", "--format", "vllm"]
    capsys.readouterr()
    assert main([*given, "--rank", "16", "--to", str(to)]) == 0
    *lines, _served = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        f"few-{n:02}" for n in range(60)
    ]
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    plain, seen = logits(base, tokenizer), set()
    model: Any = None
    for line in lines:
        name = line.split(": ")[1].split(",")[0]
        lost = float(line.split(", ")[1].split("%")[0]) / 100
        about = json.loads((to / name / "mta.json").read_text())
        assert 0 < lost == pytest.approx(float(about["error"]), abs=1e-4)
        if model is None:
            model = PeftModel.from_pretrained(base, str(to / name), adapter_name=name)
        else:
            found = model.load_adapter(str(to / name), adapter_name=name)
            assert not found.unexpected_keys
        model.set_adapter(name)
        for other in {*model.peft_config} - {name}:
            model.delete_adapter(other)
        change = float((logits(model, tokenizer) - plain).abs().max())
        assert change > 1e-3
        seen.add(change)
        assert model.peft_config[name].r == 16
    assert len(seen) == 60


def test_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers hold weights as [in, out], and one of them is query, key and value at once.

    The folder says so, stock PEFT adds what the whole model has, and vLLM is refused.
    """
    gpt2(tmp_path / "model", 0.0)
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    cell = run(tmp_path, ROLES, methods=["mta"])
    made = Run(id="two", name="two", date="", report="two", config={}, cells=(cell,))
    export(Finished(made), "few-0", tmp_path / "lora")
    merged_model(Finished(made), "few-0", tmp_path / "whole")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert "transformer.h.0.attn.c_attn" in config["target_modules"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain = logits(base, tokenizer)
    stock: Any = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert stock.base_model.model.transformer.h[0].attn.c_attn.fan_in_fan_out
    wanted = logits(stock.merge_and_unload(), tokenizer)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), tokenizer)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-3
    with pytest.raises(InputError, match="vLLM takes no LoRAs on layers like GPT-2's"):
        next(vllm_folders(Finished(made), tmp_path / "vllm"))
    assert not (tmp_path / "vllm").exists()


def test_fused_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3's: by the names of transformers, which vLLM's Phi3ForCausalLM has too.

    Its `packed_modules_mapping` is qkv_proj: [qkv_proj], gate_up_proj: [gate_up_proj].
    """
    phi3 = base_of("phi3")
    phi3.model.save_pretrained(tmp_path / "model")
    phi3.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    cell = run(tmp_path, ROLES, methods=["mta"])
    made = Run(id="three", name="three", date="", report="three", config={}, cells=(cell,))
    found = [*vllm_folders(Finished(made), tmp_path / "vllm", rank=8)]
    assert len(found) == 3
    for one in found:
        assert isinstance(one, Served)
        weights = load_file(one.folder / "adapter_model.safetensors")
        assert {match[1] for name in weights if (match := WEIGHT.fullmatch(name))} == {
            "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
        }  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        plain = logits(base, phi3.tokenizer)
        adapted = logits(PeftModel.from_pretrained(base, str(one.folder)), phi3.tokenizer)
        assert (adapted - plain).abs().max() > 1e-3


def test_ranks() -> None:
    assert [max_lora_rank(one) for one in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(InputError, match="--rank 0"):
        max_lora_rank(0)
