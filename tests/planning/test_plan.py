"""What a recipe will need: counted from shapes, and the same as what is then there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.cli.main import main
from loratune.cli.verbs.plan import duration
from loratune.errors import UserError
from loratune.families.architectures import architectures
from loratune.families.load import load_model, without_weights
from loratune.families.save import write_settings
from loratune.lora.inject import LoRA
from loratune.planning.calibrate import firsts, matrix_rate
from loratune.planning.footprint import Rules, imagine, state_bytes, step, weight_bytes
from loratune.planning.plan import make_plan, parse_memory, size_text
from loratune.recipe.run import run as run_recipe
from loratune.training.lora_module import LoRAModule
from loratune.training.memory import Memory


def test_a_base_without_weights_is_the_same_but_for_the_numbers(tiny_base: Path) -> None:
    with without_weights():
        empty = LoRAModule(str(tiny_base), LoRA(rank=4, targets="all"))
    full = LoRAModule(str(tiny_base), LoRA(rank=4, targets="all"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    told = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in one.named_parameters()} for one in (empty, full)]
    assert told[0] == told[1]
    assert not next(load_model(str(tiny_base)).parameters()).is_meta


def condition() -> dict[str, torch.Tensor]:
    """What the embedded base's network is told of two captions, on the meta device."""
    return {"text": torch.empty(2, 77, 128, device="meta")}


def real_step(module: LoRAModule, count: int, shape: Any, dtype: torch.dtype | None) -> int:
    """Bytes that autograd keeps in a true forward pass, the parameters themselves apart."""
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    held: dict[int, int] = {}
    kept = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept.append(value)  # so that no address is used twice
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.no_grad():
        told = module.model.encode_prompts(["a disc"] * count)
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), autocast:
        x_t, t = torch.zeros(count, *shape), torch.zeros(count, dtype=torch.long)
        module.model.denoise(x_t, t, told).square().mean()
    return sum(held.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("targets", ["cross-attention", "all"])
@pytest.mark.parametrize(
    "memory", [Memory(), Memory(gradient_checkpointing=True, dtype="bfloat16")], ids=["plain", "saving"]
)
def test_activations_are_those_of_a_true_step(precision: str, targets: str, memory: Memory) -> None:
    lora, shape = LoRA(rank=4, targets=targets), (4, 16, 16)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    real = real_step(LoRAModule("builtin:emoji-64", lora, memory=memory), 2, shape, dtype)
    with without_weights():
        module = LoRAModule("builtin:emoji-64", lora, memory=memory)
    imagine(module, precision)
    with torch.no_grad():
        told = module.model.encode_prompts(["a disc"] * 2)
    made = step(module.model, 2, shape, lambda: told, Rules(precision, gpu=False), backward=False)
    assert made.activations == pytest.approx(real, rel=0.06)
    assert made.flops > 0


def test_checkpointing_has_its_peak_in_the_backward_pass() -> None:
    made = {}
    for backward in (False, True):
        with without_weights():
            module = LoRAModule("builtin:emoji-64", LoRA(rank=4), memory=Memory(gradient_checkpointing=True))
        imagine(module, "32-true")
        made[backward] = step(module.model, 2, (4, 16, 16), condition, Rules("32-true", False), backward)
    assert made[True].activations == made[False].activations
    assert made[True].transient > made[False].transient


def test_a_gpu_takes_norms_in_float32() -> None:
    found = []
    for gpu in (False, True):
        with without_weights():
            module = LoRAModule("builtin:emoji-64", LoRA(rank=4))
        imagine(module, "bf16-mixed")
        found.append(step(module.model, 2, (4, 16, 16), condition, Rules("bf16-mixed", gpu), False).activations)
    assert found[1] > 1.1 * found[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_counted_as_they_will_be_held(kind: Any) -> None:
    with without_weights():
        module = LoRAModule("builtin:emoji-64", LoRA(rank=4), memory=Memory(quantization=kind))
    plain = weight_bytes(load_model("builtin:emoji-64").network, True)
    real = LoRAModule("builtin:emoji-64", LoRA(rank=4), memory=Memory(quantization=kind)).model.network
    held = sum(p.numel() * p.element_size() for p in real.parameters() if not p.requires_grad)
    counted = weight_bytes(module.model.network, False)
    assert counted < 0.7 * plain
    assert counted == pytest.approx(held, rel=0.02)  # `held` lacks the scales


@pytest.mark.parametrize(("name", "rate"), [("AdamW", 8), ("SGD", 0), ("Adafactor", None), ("AdamW8bit", 2)])
def test_the_state_of_an_optimizer_is_measured(name: str, rate: float | None) -> None:
    import bitsandbytes

    kind = getattr(torch.optim, name, None) or getattr(bitsandbytes.optim, name)
    found = state_bytes(lambda parameters: kind(parameters, lr=1e-3), [1 << 20, 1 << 20])
    assert found == pytest.approx(rate * 2**21, rel=0.05, abs=64) if rate is not None else found > 0


def plan_of(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(recipe), "--json", *words]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_plan_says_what_the_run_then_has(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = plan_of(recipe, capsys, "--steps-per-second", "2")
    cli = run_recipe(["fit", "-c", str(recipe)])
    parameters = list(cli.model.parameters())
    assert told["trained"] == sum(p.numel() for p in parameters if p.requires_grad)
    assert told["frozen"] == sum(p.numel() for p in parameters if not p.requires_grad)
    assert told["steps"] == cli.trainer.global_step == 6
    assert told["batch"] == 4
    assert told["images"] == 12
    assert told["seconds"] == 3.0
    memory = told["memory"]
    assert memory["weights"] == 4 * told["frozen"]
    assert memory["adapter"] == memory["gradients"] == 4 * told["trained"]
    assert memory["optimizer"] == pytest.approx(2 * memory["adapter"], rel=0.01)
    assert told["training"] == sum(memory.values())
    written = sum(file.stat().st_size for file in (recipe.parent / "cache").rglob("*.safetensors"))
    assert told["cache"] == pytest.approx(written, rel=0.2)


def test_each_key_that_saves_memory_does_so_in_the_plan(recipe: Path) -> None:
    plain = make_plan(recipe, gpu=False)
    freed = make_plan(recipe, False, ["--model.memory.unload_encoders", "true"])
    assert freed.memory["weights"] < plain.memory["weights"]
    again = make_plan(recipe, False, ["--model.memory.gradient_checkpointing", "true"])
    assert again.memory["activations"] < 0.6 * plain.memory["activations"]
    assert again.flops > plain.flops
    halved = make_plan(recipe, False, ["--data.batch_size", "2"])
    assert halved.memory["activations"] < 0.6 * plain.memory["activations"]
    averaged = make_plan(recipe, False, ["--trainer.callbacks+", "EMA"])
    assert averaged.memory["adapter"] == 2 * plain.memory["adapter"]
    assert make_plan(recipe, gpu=True).memory["device"] > 0
    text = make_plan(recipe, False, ["--model.lora.text_encoder", "true"])
    assert text.trained > plain.trained
    assert text.memory["activations"] > plain.memory["activations"]


def test_full_fine_tuning_is_planned(tiny_base: Path, recipe: Path) -> None:
    text = recipe.read_text().replace("  base:", "  class_path: DiffusionModule\n  init_args:\n    base:")
    head, _, tail = text.partition("  lora:")
    recipe.write_text(head + tail[tail.index("data:") :])
    made = make_plan(recipe, gpu=False)
    assert made.trained == sum(p.numel() for p in load_model(str(tiny_base)).network.parameters())
    assert made.memory["trained"] == 4 * made.trained


@pytest.fixture
def sdxl(recipe: Path, tmp_path: Path) -> Path:
    """A recipe on SDXL itself, of which only the configurations are there."""
    (tmp_path / "sdxl").mkdir()
    write_settings(tmp_path / "sdxl", architectures()["sdxl"])
    lines = recipe.read_text().replace("resolution: 16", "resolution: 1024").splitlines()
    lines = [f"  base: {tmp_path / 'sdxl'}" if line.startswith("  base:") else line for line in lines]
    recipe.write_text("\n".join(lines).replace("batch_size: 4", "batch_size: 1"))
    return recipe


def test_changes_that_make_a_recipe_fit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = make_plan(recipe, gpu=True).peak
    enough = plan_of(recipe, capsys, "--device", f"{needed / 1e9 + 0.001}GB")
    assert enough["fits"] is True
    assert enough["changes"] == []
    less = make_plan(recipe, True, ["--model.memory.dtype", "bfloat16"]).peak
    assert less < needed
    told = plan_of(recipe, capsys, "--device", f"{(less + 1) / 1e6:.6f}MB")
    assert told["fits"] is False
    assert told["changes"] == ["model.memory.dtype: bfloat16"]


def test_advice_gives_up_when_nothing_helps(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = recipe.read_text().replace("batch_size: 4", "batch_size: 1").replace("lora: {", "lora: {init: pissa, ")
    recipe.write_text(words)
    assert main(["plan", str(recipe), "--device", "1MB"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit" in said
    assert "No change that is known here makes it fit" in said


def test_sdxl_is_planned_from_its_configuration_alone(sdxl: Path) -> None:
    made = make_plan(sdxl, True, ["--trainer.precision", "bf16-mixed"])
    assert made.frozen == pytest.approx(3.47e9, rel=0.01)
    assert made.memory["weights"] == 4 * made.frozen
    assert made.flops == pytest.approx(14.0e12, rel=0.1)
    assert made.sizes == ((1024, 1024),)


@pytest.mark.parametrize(("text", "count"), [("24GB", 24e9), ("23.5GiB", 23.5 * 2**30), ("800 mb", 8e8)])
def test_sizes_of_memory_are_read(text: str, count: float) -> None:
    assert parse_memory(text) == int(count)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "24"], "--device 24: give cpu, gpu, or a GPU's memory such as 24GB"),
        (["--steps-per-second", "0"], "--steps-per-second is 0.0; give a number above 0"),
    ],
)
def test_wrong_words_are_told(
    recipe: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe), *words]) == 2
    assert expected in capsys.readouterr().err


def test_other_modules_are_refused(tmp_path: Path, images: Path) -> None:
    recipe = tmp_path / "vae.yaml"
    recipe.write_text(f"model: {{class_path: AutoencoderModule}}\ndata: {{path: {images}, resolution: 16}}\n")
    with pytest.raises(UserError, match="plan knows LoRAModule and DiffusionModule, not AutoencoderModule"):
        make_plan(recipe, gpu=False)


def test_true_steps_are_taken_and_leave_nothing(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    told = plan_of(recipe, capsys, "--run")
    assert set(told["measured"]["steps"]) == {"4x4x8x8"}
    assert 0 < told["measured"]["seconds_per_step"] == told["seconds"] / told["steps"]
    assert told["measured"]["peak"] > 1e6
    assert not (tmp_path / "run").exists()


def test_the_first_batch_of_each_shape_is_taken_twice() -> None:
    batches = [{"mean": torch.zeros(2, 4, side, 8)} for side in (8, 4, 8)]
    assert [batch["mean"].shape[2] for batch in firsts(lambda: batches)] == [8, 8, 4, 4]


def test_what_a_plan_prints(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    for part in ("trained", "frozen", "activations", "optimizer", "12 of 16x16; 4 a step", "at least"):
        assert part in said, part
    assert size_text(1.5e9) == "1.50 GB"
    assert size_text(2e6) == "2.0 MB"
    assert [duration(one) for one in (20, 600, 7320)] == ["20 s", "10 min", "2 h 2 min"]


def test_drawing_is_planned_where_something_is_drawn(recipe: Path) -> None:
    assert make_plan(recipe, gpu=False).sampling == 0
    compared = make_plan(recipe, gpu=False, words=["--evaluation.every_n_steps", "2"])
    drawn = make_plan(recipe, gpu=False, words=["--samples.every_n_steps", "2"])
    assert 0 < compared.sampling <= drawn.sampling
    assert drawn.sampling > sum(drawn.memory[part] for part in ("weights", "adapter", "optimizer"))


def test_a_large_image_is_decoded_in_more_memory_than_it_is_encoded_in(sdxl: Path) -> None:
    words = ["--trainer.precision", "bf16-mixed", "--samples.every_n_steps", "100"]
    made = make_plan(sdxl, gpu=True, words=words)
    assert made.sampling > made.encoding > 0
    assert made.peak == max(made.training, made.sampling)


def test_a_rate_is_of_this_device() -> None:
    assert 1e8 < matrix_rate("cpu", "32-true") < 1e16
