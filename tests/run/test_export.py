"""`sapo-export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import PeftModel
from tiny import logps_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_rl.config import Config, LoraConfig, ModelConfig
from sapo_rl.policy import checkpoint as checkpoints
from sapo_rl.policy import manifest
from sapo_rl.policy.lora import LoraPolicy
from sapo_rl.policy.model import load_policy
from sapo_rl.policy.tensor_file import write_tensors
from sapo_rl.policy.trainer import PolicyTrainer
from sapo_rl.run import export


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Path) -> Path:
    """A checkpoint of two ranks, with other weights than the model's, and the run that it is of."""
    run = tmp_path / "run"
    folder = run / "checkpoints/step_000002"
    folder.mkdir(parents=True)
    config = yaml.safe_dump(
        {
            "model": {"path": str(tiny_model), "dtype": "float32", "lora": {"rank": 0}},
            "data": {"source": "arithmetic"},
            "loss": {"name": "sapo"},
        }
    )
    (run / "config.yaml").write_text(config)
    lines = [{"step": step, "time": 1.0, "eval/reward": step / 4} for step in (0, 2, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = [(f"weight/{name}", weight.detach() + 1) for name, weight in model.named_parameters()]
    for rank in (0, 1):
        write_tensors(folder / f"trainer_{rank:05d}.safetensors", weights[rank::2])
    record = {"step": 2, "updates": 2, "state": {"config": config}}
    (folder / manifest.RECORD).write_text(json.dumps(record))
    manifest.write_manifest(folder, 2, {path.name: manifest.entry_of(path) for path in folder.iterdir()})
    return folder


def test_a_sharded_checkpoint_becomes_a_model_that_others_can_read(checkpoint: Path, tiny_model: Path) -> None:
    out = checkpoint.parent.parent / "out"
    export.main([str(checkpoint), "--out", str(out)])
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(after[name], before[name] + 1) for name in before)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    card = (out / "README.md").read_text()
    assert "| step | eval/reward |" in card and "| 2 | 0.5 |" in card and "| 4 |" not in card
    assert "source: arithmetic" in card and yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_a_checkpoint_of_adapters_becomes_the_whole_model_with_the_adapters_beside_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    adapters = LoraConfig(rank=3, target_modules=["q_proj", "o_proj"])
    model = ModelConfig(path=str(tiny_model), dtype="float32", lora=adapters)
    policy = LoraPolicy(load_policy(model), model.lora, seed=0, base=str(tiny_model))
    for name, parameter in policy.trainable_weights():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 8
    trainer = PolicyTrainer(policy, None, Config(model=model), Accelerator(cpu=True))
    config = yaml.safe_dump({"model": asdict(model), "loss": {"name": "sapo"}})
    (tmp_path / "run").mkdir()
    checkpoints.save(tmp_path / "run/checkpoints", 3, trainer, {"config": config}, keep_last=1, best=3)
    export.main([str(tmp_path / "run/checkpoints/best"), "--out", str(tmp_path / "out")])
    ids = [5, 9, 33, 7]
    expected = trainer.score(ids)
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tiny_model, tmp_path / "out")
    )
    assert logps_of(plain, ids) != pytest.approx(expected, abs=1e-2)
    assert logps_of(merged, ids) == pytest.approx(expected, abs=1e-4)
    adapted: Any = PeftModel.from_pretrained(plain, str(tmp_path / "out/adapter"))
    assert logps_of(adapted, ids) == pytest.approx(expected, abs=1e-4)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert "| step | 3 |" in (tmp_path / "out/README.md").read_text()


def test_a_damaged_checkpoint_or_a_folder_that_is_taken_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(SystemExit) as stopped:
        export.main([str(checkpoint), "--out", str(tmp_path / "taken")])
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main(["org/name", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "sapo-export: model: 'org/name' is no run and no checkpoint\n"
    file = checkpoint / "trainer_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(SystemExit):
        export.main([str(checkpoint), "--out", str(tmp_path / "out")])
    assert f"sapo-export: '{file}' cannot be used: it is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_it_is_sent_to_the_hub_only_where_that_is_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **how: sent.append((name, how)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **how: sent.append(how))
    export.main([str(checkpoint), "--out", str(tmp_path / "a")])
    assert sent == []
    export.main([str(checkpoint), "--out", str(tmp_path / "b"), "--push", "me/mine", "--private"])
    assert sent == [
        ("me/mine", {"private": True, "exist_ok": True}),
        {"folder_path": str(tmp_path / "b"), "repo_id": "me/mine"},
    ]


@pytest.mark.parametrize(
    ("readme", "told"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c\n---",
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c"},
        ),
        ("---\nlicense: [mit, 1]\n---\n", {}),
        ("---\n{broken: [\n---\n", {}),
        ("# Base\n---\nlicense: mit\n---\n", {}),
        (None, {}),
    ],
)
def test_the_card_has_the_license_of_the_base(
    checkpoint: Path, tmp_path: Path, readme: str | None, told: dict[str, str]
) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    head = yaml.safe_load(export.final_card(run, 4).split("---")[1])
    assert {key: value for key, value in head.items() if key.startswith("license")} == told
