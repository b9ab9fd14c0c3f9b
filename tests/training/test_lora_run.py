"""A LoRA from recipe to file: what is trained, what is written, what is the same twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families.architectures import architectures, module_names
from loratune.families.base import Base
from loratune.families.load import load_model
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.inject import LoRA, adapted_layers, switch
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.load import load_with
from loratune.lora.verify import verify
from loratune.recipe.run import run as run_recipe
from loratune.training.lora_module import LoRAModule


def predictions(family: object, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=random)
    with torch.no_grad():
        told = family.encode_prompts(["a red disc", "a blue disc"])  # type: ignore[attr-defined]
        return family.denoise(x, torch.tensor([10, 900]), told)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text_encoder", [False, True])
def test_step_zero_is_the_base_exactly(tiny_base: Path, text_encoder: bool) -> None:
    base = load_model(str(tiny_base)).eval()
    module = LoRAModule(str(tiny_base), LoRA(rank=4, text_encoder=text_encoder)).eval()
    assert torch.equal(predictions(base), predictions(module.model))
    for layer in adapted_layers(module.model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    assert not torch.equal(predictions(base), predictions(module.model))
    switch([module.model], 0.0)
    assert torch.equal(predictions(base), predictions(module.model))


def test_only_b_and_a_are_trained_and_saved(tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=4))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert all(".attn2.to_" in name and "to_out" not in name for name in trained)
    assert sorted(module.state_dict()) == sorted(trained)


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_diffusers_draws_with_the_lora_as_we_do(
    recipe: Path, tmp_path: Path, tiny_base: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["fit", "-c", str(recipe), "--export.format", format, "--model.lora.text_encoder", "true"]
    assert main(words) == 0
    lora = tmp_path / "run" / "lora.safetensors"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(lora)
    assert not [record for record in caplog.records if "key" in record.getMessage().lower()]
    ours, base = load_with(str(tiny_base), [str(lora)], "cpu"), load_model(str(tiny_base))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([600])
    with torch.no_grad():
        told = pipeline.text_encoder(ours.family.read(ours, ["a red disc"]).ids).last_hidden_state
        theirs = pipeline.unet(x, t, told).sample
        assert torch.allclose(theirs, ours.denoise(x, t, ours.encode_prompts(["a red disc"])), atol=1e-5)
        assert not torch.allclose(theirs, base.denoise(x, t, base.encode_prompts(["a red disc"])), atol=1e-3)


def test_a_run_leaves_a_lora_with_its_recipe(recipe: Path, tmp_path: Path, tiny_base: Path) -> None:
    assert main(["fit", "-c", str(recipe)]) == 0
    run = tmp_path / "run"
    file = read_lora(run / "lora.safetensors")
    assert {layer.rank for layer in file.layers.values()} == {4}
    assert {layer.scale for layer in file.layers.values()} == {2.0}
    assert max(float(layer.up.abs().max()) for layer in file.layers.values()) > 0
    assert "max_steps: 6" in file.metadata["loratune.recipe"]
    assert file.metadata["loratune.base"] == str(tiny_base)
    assert len(file.metadata["loratune.base_hash"]) == 64
    assert file.metadata["ss_network_dim"] == "4"
    tags = json.loads(file.metadata["ss_tag_frequency"])["images"]
    assert 6 <= sum(tags.values()) <= 12
    assert all(tag.startswith("a ") for tag in tags)
    assert file.metadata["modelspec.resolution"] == "16x16"
    assert file.metadata["modelspec.date"].startswith("20")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert (run / "recipe.yaml").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert not list(run.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        assert main(["fit", "-c", str(recipe), "--trainer.default_root_dir", str(tmp_path / name)]) == 0
        made.append(load_file(tmp_path / name / "lora.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    other = tmp_path / "three"
    assert main(["fit", "-c", str(recipe), "--seed_everything", "4", "--trainer.default_root_dir", str(other)]) == 0
    third = load_file(other / "lora.safetensors")
    assert any(not torch.equal(made[0][key], third[key]) for key in third)


def test_a_resumed_run_ends_where_the_whole_one_does(recipe: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main(["fit", "-c", str(recipe), "--trainer.default_root_dir", str(whole)]) == 0
    words = ["fit", "-c", str(recipe), "--trainer.default_root_dir", str(half)]
    assert main([*words, "--trainer.max_steps", "3"]) == 0
    assert main([*words, "--ckpt_path", str(half / "checkpoints" / "last.ckpt")]) == 0
    one, two = load_file(whole / "lora.safetensors"), load_file(half / "lora.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_wrong_file_does_not_pass_the_reading_back(tmp_path: Path, format: str) -> None:
    torch.manual_seed(0)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    layer = LoRALayer(torch.randn(4, 16), torch.randn(8, 4), 2.0)
    path = tmp_path / "x.safetensors"
    write_lora(path, LoRAFile({name: layer}, {}), format, torch.float16)  # type: ignore[arg-type]
    verify(path, {name: layer}, format, torch.float16)
    for wrong in (LoRALayer(layer.down, layer.up * 1.01, 2.0), LoRALayer(layer.down, layer.up, 4.0)):
        with pytest.raises(Exception, match="do not use this file"):
            verify(path, {name: wrong}, format, torch.float16)
    with pytest.raises(Exception, match="do not use this file"):
        verify(path, {name.replace("to_q", "to_k"): layer}, format, torch.float16)


@pytest.mark.parametrize(
    ("kind", "format", "algorithm"), [("dora", "peft", "lora"), ("loha", "kohya", "loha"), ("lokr", "kohya", "lokr")]
)
def test_other_kinds_are_written_and_read(
    recipe: Path, tmp_path: Path, tiny_base: Path, kind: str, format: str, algorithm: str
) -> None:
    words = ["--model.lora.type", kind, "--export.format", format, "--export.dtype", "float32"]
    assert main(["fit", "-c", str(recipe), *words]) == 0
    path = tmp_path / "run" / "lora.safetensors"
    ours, base = load_with(str(tiny_base), [str(path)], "cpu"), load_model(str(tiny_base))
    assert not torch.allclose(predictions(ours), predictions(base), atol=1e-3)
    file = read_lora(path, module_names(Base.open(str(tiny_base)).configs))
    assert {layer.name for layer in file.layers.values()} == {KINDS[kind]}
    assert file.metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(file.metadata["ss_network_args"])["algo"] == algorithm


KINDS = {"dora": "DoRA of LoRA", "loha": "LoHa", "lokr": "LoKr"}


def test_a_kind_that_the_format_cannot_hold_is_refused_before_training(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", str(recipe), "--model.lora.type", "loha", "--export.format", "peft"]) == 2
    assert "peft cannot hold loha; set export.format: kohya" in capsys.readouterr().err
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def changed(layer: LowRank, field: str) -> LowRank:
    return type(layer)(**{**vars(layer), field: getattr(layer, field) * 1.5})


LAYERS: dict[str, tuple[str, LowRank]] = {
    "w1_a": ("kohya", LoHaLayer(torch.rand(4, 2), torch.rand(2, 3), torch.rand(4, 2), torch.rand(2, 3), 1.0)),
    "w2": ("kohya", LoKrLayer(2.0, w1=torch.rand(2, 2), w2=torch.rand(2, 3))),
    "alpha": ("kohya", LoKrLayer(2.0, w1=torch.rand(2, 2), w2_a=torch.rand(2, 2), w2_b=torch.rand(2, 2))),
    "magnitude": ("peft", LoRALayer(torch.rand(2, 3), torch.rand(4, 2), 1.0, magnitude=torch.rand(4, 1))),
    "up": ("kohya", LoRALayer(torch.rand(2, 3), torch.rand(4, 2), 1.0, magnitude=torch.rand(4, 1))),
}


@pytest.mark.parametrize("field", LAYERS)
def test_a_wrong_file_of_any_kind_does_not_pass(tmp_path: Path, field: str) -> None:
    format, layer = LAYERS[field]
    path = tmp_path / "x.safetensors"
    write_lora(path, LoRAFile({"unet.conv_in": layer}), format, torch.float16)  # type: ignore[arg-type]
    verify(path, {"unet.conv_in": layer}, format, torch.float16)
    with pytest.raises(UserError, match="do not use this file"):
        verify(path, {"unet.conv_in": changed(layer, field)}, format, torch.float16)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_every_layer_is_found_under_its_published_name(tmp_path: Path, family: str, format: str) -> None:
    names = module_names(architectures()[family])
    layers = {name: LoRALayer(torch.rand(1 + i % 2, 3), torch.rand(2, 1 + i % 2), 1.0) for i, name in enumerate(names)}
    write_lora(tmp_path / "x.safetensors", LoRAFile(layers), format)  # type: ignore[arg-type]
    verify(tmp_path / "x.safetensors", layers, format, torch.float32)
    original = any("input_blocks_4_1_" in key for key in load_file(tmp_path / "x.safetensors"))
    assert original == (family == "sdxl" and format == "kohya")


def test_tensorboard_has_what_a_run_is_judged_by(recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--samples.every_n_steps", "3", "--samples.steps", "2", "--samples.prompts", "[a red disc, a blue disc]"]
    assert main(["fit", "-c", str(recipe), *words]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/grad_norm", "train/steps_per_second", "val/loss", "train/lr"}
    assert wanted <= set(tags["scalars"])
    assert [event.step for event in events.Images("samples")] == [0, 3, 6]
    assert {"recipe/text_summary", "samples/prompts/text_summary"} <= set(tags["tensors"])
    assert len(events.Scalars("train/loss")) == 6
    first, last = events.Images("samples")[0], events.Images("samples")[-1]
    assert first.encoded_image_string != last.encoded_image_string


def test_the_held_out_loss_is_the_same_whenever_it_is_asked(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    cli = run_recipe(["-c", str(recipe)], execute=False)
    found = []
    for _ in range(2):
        found.append(cli.trainer.validate(cli.model, datamodule=cli.datamodule)[0]["val/loss"])
        torch.randn(7)  # moves the global generator, which must not matter
    assert found[0] == found[1] > 0


def test_last_goes_on_where_the_run_stopped(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["fit", "-c", str(recipe), "--trainer.max_steps", "3"]) == 0
    loaded, load = [], torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    assert main(["fit", "-c", str(recipe), "--ckpt_path", "last"]) == 0
    assert read_lora(tmp_path / "run" / "lora.safetensors").metadata["loratune.steps"] == "6"
    assert loaded
    assert all(loaded)


def test_the_last_checkpoint_is_of_the_last_step(recipe: Path, tmp_path: Path) -> None:
    words = ["--checkpoint.every_n_train_steps", "4", "--data.validation_percent", "0"]
    assert main(["fit", "-c", str(recipe), *words]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 6
