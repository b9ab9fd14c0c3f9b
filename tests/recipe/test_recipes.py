"""Every shipped recipe is parsed and built, and a recipe's mistakes are told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import AutoencoderKL

from loratune.cli.main import main
from loratune.recipe.run import run
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.lora_module import LoRAModule

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
BIG = {"character.yaml", "concept-token.yaml", "sd15-style.yaml", "sdxl-qlora.yaml", "sdxl-style.yaml"}


def shrunk(path: Path, tiny_base: Path, tmp_path: Path) -> list[str]:
    """What stands in for a base that is not here: a checkpoint from a hub, and a VAE trained before."""
    words = ["--trainer.default_root_dir", str(tmp_path / "run")]
    if path.name in BIG:
        words += ["--model.base", str(tiny_base)]
    if path.name == "latent-diffusion.yaml":
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            norm_num_groups=4,
        ).save_pretrained(tmp_path / "vae")
        words += ["--model.init_args.architecture.init_args.vae", str(tmp_path / "vae")]
    return words


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_parsed_and_built(
    path: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cli = run(["-c", str(path), *shrunk(path, tiny_base, tmp_path)], execute=False)
    settings = yaml.safe_load(path.read_text())
    assert cli.trainer.max_steps == settings["trainer"]["max_steps"]
    assert cli.datamodule.batch_size == settings["data"]["batch_size"]
    if "class_path" not in settings["model"]:
        assert isinstance(cli.model, LoRAModule)
        assert cli.model.lora.rank == settings["model"]["lora"]["rank"]
    assert any(parameter.requires_grad for parameter in cli.model.parameters())
    if isinstance(cli.model, DiffusionModule):
        assert cli.model.objective.caption_dropout == yaml_objective(settings).get("caption_dropout", 0.0)
    assert not (tmp_path / "run").exists()


def yaml_objective(settings: dict[str, Any]) -> dict[str, Any]:
    model = settings["model"]
    found: dict[str, Any] = model.get("init_args", model).get("objective", {})
    return found


def test_recipes_are_short() -> None:
    assert len(RECIPES) >= 6
    for path in RECIPES:
        assert 15 <= len(path.read_text().splitlines()) <= 34, path


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rank: 4", "rnak: 4", ": unknown key 'model.lora.rnak'; did you mean 'model.lora.rank'?"),
        ("rank: 4", "rank: big", ": 'model.lora.rank': big is not of type int"),
        ("resolution: 16", "resolutoin: 16", ": unknown key 'data.resolutoin'; did you mean 'data.resolution'?"),
        ("max_steps", "max_step", ": unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("data:\n", "dta:\n", ": unknown key 'dta'; did you mean 'data'?"),
        ("lr: 1.0e-2", "lrr: 1.0e-2", ": unknown key 'model.optimizer.init_args.lrr' of torch.optim.AdamW"),
        ("torch.optim.AdamW", "AdamQ", ": unknown class 'AdamQ'; did you mean 'Adam"),
        ("rank: 4", "rank: 0", "lora.rank is 0; give 1 or more"),
        ("rank: 4", "dropout: 1.5", "lora.dropout is 1.5"),
        ("targets: cross-attention", "targets: 'attn7.*'", "matches no layer; there are: "),
        ("targets: cross-attention", "targets: '('", "no preset and no regular expression"),
        ("resolution: 16", "resolution: 16\n  batch_size: 0", "batch_size is 0"),
        ("seed_everything: 3", "seed_everything: [", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(
    recipe: Path, tmp_path: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new).replace("  batch_size: 4\n", "", "batch_size: 0" in new))
    assert main(["fit", "-c", str(recipe)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loratune: ")]
    assert len(told) == 1
    line = recipe.read_text()[: recipe.read_text().index(new)].count("\n") + 1
    assert (f":{line}{expected}" if expected.startswith(": ") else expected) in told[0]
    assert str(recipe) in told[0] or "lora.targets" in told[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("empty", "no images in this folder"),
        ("caption", "have no caption: "),
        ("base", "a pickle can run any code"),
        ("truncated", "diffusion_pytorch_model.safetensors"),
        ("missing", "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    recipe: Path, tiny_base: Path, images: Path, tmp_path: Path, spoil: str, expected: str, capsys: Any
) -> None:
    import shutil

    words = ["fit", "-c", str(recipe)]
    if spoil == "empty":
        (tmp_path / "empty").mkdir()
        words += ["--data.path", str(tmp_path / "empty")]
    elif spoil == "caption":
        lines = (images / "metadata.jsonl").read_text().splitlines()
        (images / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        expected = f"1 of 12 images {expected}{images}/11.png"
    elif spoil == "base":
        (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
        words += ["--model.base", str(tmp_path / "model.ckpt")]
    elif spoil == "truncated":
        shutil.copytree(tiny_base, tmp_path / "cut")
        file = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        words += ["--model.base", str(tmp_path / "cut")]
    else:
        words += ["--model.base", str(tmp_path / "nowhere")]
    assert main(words) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loratune: ")]
    assert len(told) == 1
    assert expected in told[0]
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("lora*.safetensors"))


def test_unreadable_images_are_left_out_and_named(
    recipe: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "03.png").write_bytes(b"no image")
    assert main(["fit", "-c", str(recipe), "--trainer.max_steps", "1"]) == 0
    assert "1 of 12 images are unreadable and left out" in caplog.text
    assert "03.png" in caplog.text
    assert main(["fit", "-c", str(recipe), "--trainer.max_steps", "1", "--data.strict", "true"]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model.lora.rnak 4", "unknown key 'model.lora.rnak'; did you mean 'model.lora.rank'?"),
        ("--model.optimizer AdamQ", "unknown class 'AdamQ'; did you mean 'Adam"),
        ("--trainer.callbacks+=EMMA", "unknown class 'EMMA'; did you mean 'EMA'?"),
        ("--model.lora.type lorra", "lorra"),
        (
            "--model.objective.min_snr_gamma 5 --model.objective.debiased_estimation true",
            "both weigh by the SNR; keep one",
        ),
        ("--model.objective.huber_schedule snr", "huber_schedule is 'snr', but huber_c is null; set huber_c"),
        ("--model.objective.prediction eps", "prediction 'eps' learns nothing"),
        ("--model.objective.timesteps.mean 1", "set distribution to logit_normal"),
        ("--model.objective.timesteps.min 0.9 --model.objective.timesteps.max 0.5", "min is 0.9, max 0.5"),
        ("--model.lora.type loha --model.lora.rslora true --export.format kohya", "leave them out for loha"),
        ("--model.lora.type loha", "peft cannot hold loha; set export.format: kohya"),
        ("--model.lora.text_encoder_lr 5e-5", "lora.text_encoder is false; set it to true"),
        ("--model.lora.init pissa --model.lora.type dora", "not with type dora"),
        ("--model.lora.init pissa --model.memory.quantization nf4", "set lora.init: kaiming"),
        ("--model.lora.init_from nowhere.safetensors", "lora.init_from nowhere.safetensors: no such file"),
        ("--model.lora.targets none", "nothing else is trained; set model.tokens"),
        ("--model.lr_schedule.min_lr_ratio 0.5", "lr_schedule.min_lr_ratio says nothing of the name 'constant'"),
        ("--model.memory.unload_encoders true --samples.every_n_steps 2", "set samples.every_n_steps: 0"),
        ("--model.prompts.chunks 40", "prompts.chunks is 40; give 1 to 16"),
    ],
)
def test_bad_input_is_one_line_before_a_weight_is_read(
    recipe: Path, tmp_path: Path, words: str, expected: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratune.training.diffusion_module as module

    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a weight was read"))
    assert main(["fit", "-c", str(recipe), *words.split()]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loratune: ")]
    assert len(told) == 1
    assert expected in told[0]
    assert not (tmp_path / "run").exists()


def test_help_of_fit_begins_with_the_recipes_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: loratune fit -c RECIPE [--KEY VALUE ...]\n")
    places = [
        text.index(f"\n  --{key} ") for key in ("model.lora.rank", "data.path", "samples.prompts", "trainer.max_steps")
    ]
    assert places == sorted(places)


OPTIMIZERS = {
    "in the recipe": ("optimizer: {class_path: prodigyopt.Prodigy}", []),
    "after another": ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-4}}", ["prodigyopt.Prodigy"]),
}


@pytest.mark.parametrize("way", list(OPTIMIZERS))
def test_an_optimizer_that_is_named_has_its_own_defaults(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = OPTIMIZERS[way]
    path = tmp_path / "r.yaml"
    path.write_text(f"model:\n  base: builtin:emoji-64\n  {text}\ndata: {{path: {tmp_path}}}\n")
    named = [word for name in words for word in ("--model.optimizer", name)]
    with pytest.raises(SystemExit):
        run(["fit", "-c", str(path), *named, "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]
    assert optimizer["class_path"] == "prodigyopt.Prodigy"
    assert optimizer["init_args"].get("lr", 1.0) == 1.0
    assert optimizer["init_args"].get("weight_decay", 0) == 0
