"""Looking at model folders before anything is loaded: what is damaged is named, in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sapo_rl.errors import UserError
from sapo_rl.policy.model_folder import count_parameters, local_folder, look

POINTER = "version https://git-lfs\noid sha256:0123\nsize 272\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def split(folder: Path) -> dict[str, str]:
    """Write the weights into two files with an index; return which file holds which."""
    weights = load_file(folder / WEIGHTS)
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for part in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == part}, folder / part)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return names


def test_a_whole_folder_gives_its_shape_and_count(folder: Path) -> None:
    shape, count = look(folder), count_parameters(folder)
    assert (shape["hidden_size"], shape["num_hidden_layers"]) == (64, 2)
    assert count == sum(weight.size for weight in load_file(folder / WEIGHTS).values())
    split(folder)
    assert look(folder) == shape and count_parameters(folder) == count


def test_the_shape_is_the_language_models(folder: Path) -> None:
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": shape, "vision_config": {"hidden_size": 8}}))
    assert look(folder) == shape


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "is no JSON"),
        (b"[]", "must hold a mapping, not list"),
        (b"null", "must hold a mapping, not NoneType"),
        (b"7", "must hold a mapping, not int"),
        (b"[" * 10**5, "is no JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"name": "caf\u00e9"}'.encode("latin-1"), "is no JSON in UTF-8"),
        (POINTER.encode(), "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_mapping_is_named(folder: Path, name: str, text: bytes, found: str) -> None:
    (folder / name).write_bytes(text)
    refuses(folder, name, found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 1.5),
        ("vocab_size", True),
        ("vocab_size", 10**20),
        ("max_position_embeddings", "abc"),
        ("max_position_embeddings", [1]),
        ("max_position_embeddings", {}),
        ("num_key_value_heads", "2"),
        ("head_dim", 0),
    ],
)
def test_a_size_that_cannot_be_is_named(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, f"config.json: {key} is", "must be a whole number from 1")


@pytest.mark.parametrize("value", ["</s>", -1, [2, "x"], {"a": 1}, 1.5])
def test_an_end_token_that_cannot_be_is_named(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refuses(folder, "generation_config.json", "eos_token_id")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_weights_that_are_cut_short_are_named(folder: Path, keep: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    refuses(folder, f"{folder}/{WEIGHTS}", "is no whole safetensors file" if keep else "is empty")


@pytest.mark.parametrize(("text", "found"), [(POINTER, "git lfs pull"), ("garbage " * 100, "no whole safetensors")])
def test_weights_that_are_something_else_are_named(folder: Path, text: str, found: str) -> None:
    (folder / WEIGHTS).write_text(text)
    refuses(folder, f"{folder}/{WEIGHTS}", found)


@pytest.mark.parametrize("name", ["tokenizer.json", "pytorch_model.bin"])
def test_other_pointers_are_named(folder: Path, name: str) -> None:
    if name.endswith(".bin"):
        (folder / WEIGHTS).unlink()
    (folder / name).write_text(POINTER)
    refuses(folder, f"{folder}/{name}", "git lfs pull")


def test_files_that_nobody_loads_may_be_anything(folder: Path) -> None:
    (folder / "picture.png").write_text(POINTER)
    (folder / "consolidated.safetensors").write_text(POINTER)
    look(folder)


def test_parts_of_the_weights_are_looked_at_one_by_one(folder: Path) -> None:
    split(folder)
    (folder / "part-1.safetensors").write_text(POINTER)
    refuses(folder, f"{folder}/part-1.safetensors", "git lfs pull")
    (folder / "part-1.safetensors").unlink()
    refuses(folder, f"{folder}/part-1.safetensors is missing", "model.safetensors.index.json")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        refuses(folder, f"{folder}/model.safetensors.index.json", "weight_map")


def test_layers_that_are_missing_are_counted(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: weights[name] for name in weights if ".layers.1." not in name}, folder / WEIGHTS)
    refuses(folder, "lack 1 of the 2 layers", "num_hidden_layers", "the first is 1")


def test_a_folder_without_weights_is_told_what_they_are_called(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refuses(folder, f"{folder} holds no weights", "model.safetensors")


def test_a_path_is_a_folder_or_a_name_on_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder("some/name") is None
    for path in (str(folder), "./model", "model"):
        assert local_folder(path) is not None
    (tmp_path / "some").mkdir()
    shutil.copytree(folder, tmp_path / "some/name")
    assert local_folder("some/name") is not None
    for path in ("./nowhere", "some", "/" + "a" * 300, "~nobody_at_all/model", "a\0b"):
        with pytest.raises(UserError) as refused:
            local_folder(path)
        assert len(str(refused.value).splitlines()) == 1


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as refused:
        look(folder)
    told = str(refused.value)
    assert all(word in told for word in words), told
    assert len(told.splitlines()) == 1 and len(told) < 600
