"""Any optimizer by class path, its modes, and the learning-rate schedules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loratune.cli.main import main
from loratune.lora.inject import LoRA
from loratune.recipe.run import run as run_recipe
from loratune.training import schedules
from loratune.training.lora_module import LoRAModule
from loratune.training.objectives import Objective
from loratune.training.schedules import LRSchedule, evaluated, fuse

OPTIMIZERS = {
    "prodigyopt.Prodigy": "{lr: 1.0, weight_decay: 0.01}",
    "schedulefree.AdamWScheduleFree": "{lr: 1.0e-2}",
    "bitsandbytes.optim.AdamW8bit": "{lr: 1.0e-2, min_8bit_size: 16}",
    "bitsandbytes.optim.PagedAdamW8bit": "{lr: 1.0e-2}",
    "torch.optim.AdamW": "{lr: 1.0e-2, fused: true}",
}
FREE = ("schedulefree.AdamWScheduleFree", "{lr: 1.0e-2}")


def with_optimizer(recipe: Path, name: str, arguments: str) -> Path:
    """The recipe with another optimizer."""
    text = recipe.read_text()
    old = "    class_path: torch.optim.AdamW\n    init_args: {lr: 1.0e-2}\n"
    assert old in text
    recipe.write_text(text.replace(old, f"    class_path: {name}\n    init_args: {arguments}\n"))
    return recipe


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_by_class_path_trains(recipe: Path, tmp_path: Path, name: str) -> None:
    cli = run_recipe(["fit", "-c", str(with_optimizer(recipe, name, OPTIMIZERS[name]))])
    package, _, kind = name.rpartition(".")
    assert type(cli.trainer.optimizers[0]).__name__ == kind
    assert type(cli.trainer.optimizers[0]).__module__.startswith(package.split(".")[0])
    held = load_file(tmp_path / "run" / "lora.safetensors")
    assert all(value.isfinite().all() for value in held.values())
    assert all(value.abs().max() > 0 for key, value in held.items() if "lora_B" in key)
    if "8bit" in name and "Paged" not in name:
        states = cli.trainer.optimizers[0].state.values()
        assert any(value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value))


class Spy(L.Callback):
    """What the optimizer's mode and the weights are at each stage."""

    def __init__(self) -> None:
        self.modes: list[tuple[str, bool]] = []
        self.weights: list[Tensor] = []

    def _note(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.modes.append((stage, trainer.optimizers[0].param_groups[0]["train_mode"]))
        self.weights.append(next(p for p in module.parameters() if p.requires_grad).detach().clone())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note(trainer, pl_module, "train")

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, pl_module, "validate")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note(trainer, pl_module, "after")


def test_a_schedule_free_optimizer_evaluates_its_average_and_trains_on_exactly(recipe: Path, tmp_path: Path) -> None:
    cli = run_recipe(["-c", str(with_optimizer(recipe, *FREE))], execute=False)
    spy = Spy()
    cli.trainer.callbacks.append(spy)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert {stage for stage, _ in spy.modes} == {"train", "validate", "after"}
    assert all(training == (stage != "validate") for stage, training in spy.modes)
    place = [stage for stage, _ in spy.modes].index("validate")
    after, validated, following = spy.weights[place - 1], spy.weights[place], spy.weights[place + 1]
    assert not torch.equal(after, validated)
    assert torch.equal(after, following)


def test_a_schedule_free_run_writes_the_average(recipe: Path, tmp_path: Path) -> None:
    words = ["fit", "-c", str(with_optimizer(recipe, *FREE)), "--export.dtype", "float32"]
    cli = run_recipe(words)
    written = load_file(tmp_path / "run" / "lora.safetensors")
    trained = {name: p.detach() for name, p in cli.model.named_parameters() if p.requires_grad}
    with evaluated(cli.trainer):
        average = {name: p.detach().clone() for name, p in cli.model.named_parameters() if p.requires_grad}
    first = next(name for name in trained if "lora_B" in name)
    assert not torch.equal(trained[first], average[first])
    assert any(torch.equal(value, average[first]) for value in written.values() if value.shape == average[first].shape)


def test_a_resumed_schedule_free_run_is_the_same_run(recipe: Path, tmp_path: Path) -> None:
    with_optimizer(recipe, *FREE)
    files = []
    for name, steps, more in (("whole", "6", []), ("cut", "3", []), ("cut", "6", ["--ckpt_path", "CKPT"])):
        out = tmp_path / name
        more = [str(out / "checkpoints" / "last.ckpt") if word == "CKPT" else word for word in more]
        words = ["--trainer.max_steps", steps, "--trainer.default_root_dir", str(out), "--export.dtype", "float32"]
        assert main(["fit", "-c", str(recipe), *words, *more]) == 0
        files.append(load_file(out / "lora.safetensors"))
    assert all(torch.equal(files[0][key], files[2][key]) for key in files[0])
    assert not all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_an_average_of_an_average_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "-c", str(with_optimizer(recipe, *FREE)), "--trainer.callbacks+", "EMA"]
    assert main(words) == 2
    assert "EMA: the optimizer averages the weights itself" in capsys.readouterr().err


DIFFUSERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {}),
    "cosine": ("cosine", {}, {}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
    "polynomial": ("polynomial", {"power": 2.0}, {"power": 2.0}),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_schedule_is_that_of_diffusers_after_the_warm_up(name: str) -> None:
    theirs, own, given = DIFFUSERS[name]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=4, num_training_steps=40, **given)
    ours = LRSchedule(name=name, warmup_steps=4, **own)  # type: ignore[arg-type]
    for step in range(41):
        if step >= 4:
            # diffusers' polynomial ends at 1e-7, for which it has no name.
            assert ours.factor(step, 40) == pytest.approx(scheduler.get_last_lr()[0], abs=2e-7), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (LRSchedule("constant"), [1.0, 1.0, 1.0]),
        (LRSchedule("constant", warmup_steps=1), [0.5, 1.0, 1.0]),
        (LRSchedule("linear", min_lr_ratio=0.2), [1.0, 0.6, 0.2]),
        (LRSchedule("cosine", min_lr_ratio=0.5), [1.0, 0.75, 0.5]),
        (LRSchedule("polynomial", power=2.0, min_lr_ratio=0.2), [1.0, 0.4, 0.2]),
        (LRSchedule("cosine_with_restarts", num_cycles=2), [1.0, 1.0, 0.0]),
    ],
)
def test_a_schedule_at_the_start_the_middle_and_the_end(schedule: LRSchedule, factors: list[float]) -> None:
    assert [schedule.factor(step, 2) for step in range(3)] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "cosine", "num_cycles": 2}, "lr_schedule.num_cycles is of the name cosine_with_restarts, not cosine"),
        ({"name": "cosine_with_restarts"}, "give lr_schedule.num_cycles too"),
        ({"name": "cosine_with_restarts", "num_cycles": 1}, "lr_schedule.num_cycles is 1; give 2 or more"),
        ({"name": "polynomial", "power": 0.0}, "lr_schedule.power is 0.0; give a number above 0"),
        ({"name": "linear", "power": 1.0}, "lr_schedule.power is of the name polynomial"),
        ({"name": "linear", "min_lr_ratio": 1.0}, "lr_schedule.min_lr_ratio is 1.0"),
        ({"name": "constant", "min_lr_ratio": 0.1}, "lr_schedule.min_lr_ratio says nothing of the name 'constant'"),
    ],
)
def test_senseless_schedules_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("'", ".")):
        LRSchedule(**given)


def test_a_schedule_moves_the_rate_of_a_run(recipe: Path) -> None:
    cli = run_recipe(
        ["fit", "-c", str(recipe), "--model.lr_schedule.name", "linear", "--model.lr_schedule.min_lr_ratio", "0.1"]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1)


def test_steps_are_fused_where_torch_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**more: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], **more)
        fuse(optimizer)
        return optimizer

    assert made().param_groups[0]["fused"] is None
    monkeypatch.setattr(schedules, "FUSED_ON", ("cpu",))
    fused, plain = made(), made(fused=False)
    assert fused.param_groups[0]["fused"] is True
    assert plain.param_groups[0]["fused"] is False
    for optimizer in (fused, plain):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert torch.allclose(*(one.param_groups[0]["params"][0] for one in (fused, plain)))
    sgd = torch.optim.RMSprop([nn.Parameter(torch.ones(3))])
    fuse(sgd)
    assert "fused" not in sgd.param_groups[0]


ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Asks(TorchDispatchMode):
    """Notes operations whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ASKING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def step_of(module: LoRAModule, device: str = "cpu") -> Any:
    """A training step of a module with a batch, as a trainer would call it."""
    module.to(device)
    with torch.no_grad():
        condition = module.model.encode_prompts(["a red disc", "a blue disc"])
    latents = {key: torch.zeros(2, 4, 8, 8, device=device) for key in ("mean", "logvar")}
    batch = {"name": ["a", "b"], "caption": ["a red disc", "a blue disc"], "condition": condition, **latents}
    optimizer = torch.optim.AdamW(module.trained_parameters())
    fuse(optimizer)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0, world_size=1)  # type: ignore[assignment]

    def run(moved: bool = True) -> None:
        with torch.autocast(device, torch.bfloat16):
            module.training_step(batch, 0).backward()
        if not moved:
            return
        torch.nn.utils.clip_grad_norm_(module.trained_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def modules(tiny_base: Path) -> dict[str, LoRAModule]:
    """Modules of several kinds; the objective asks for all that it can."""
    everything = Objective(
        min_snr_gamma=5.0,
        huber_c=0.1,
        huber_schedule="snr",
        noise_offset=0.1,
        input_perturbation=0.1,
        caption_dropout=0.5,
    )
    return {
        "lora": LoRAModule(str(tiny_base), LoRA(rank=4), everything),
        "text": LoRAModule(str(tiny_base), LoRA(rank=4, text_encoder=True), everything),
    }


@pytest.mark.parametrize("kind", ["lora", "text"])
def test_a_step_asks_nothing_of_the_device(tiny_base: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = modules(tiny_base)[kind]
    run = step_of(module)
    run()
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("the host waits for a tensor"))
    with Asks() as asks:
        run(moved=False)
    assert asks.found == []
    with Asks() as asks:
        torch.ones(1).item()
    assert asks.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["lora", "text"])
def test_a_step_does_not_wait_for_the_gpu(tiny_base: Path, kind: str) -> None:
    run = step_of(modules(tiny_base)[kind], "cuda")
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
