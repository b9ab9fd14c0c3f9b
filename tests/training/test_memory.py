"""How the frozen base is held: each key of model.memory does what it says, and the LoRA is like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import checkpoint

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families.load import load_model
from loratune.families.pixels import PixelDDPM
from loratune.families.prompts import Prompts
from loratune.lora.inject import LoRA
from loratune.recipe.rules import Recipe, check
from loratune.recipe.run import run as run_recipe
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.lora_module import LoRAModule
from loratune.training.memory import Memory, Unloaded, quantize, unload_encoders

BUILTIN = "builtin:emoji-64"


def bytes_of(module: nn.Module) -> int:
    """What a module's parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def output_of(module: LoRAModule) -> Tensor:
    """What the network answers at fixed x_t and t."""
    random = torch.Generator().manual_seed(0)
    told = module.model.encode_prompts(["a red disc", "a blue disc"])
    return module.model.denoise(torch.randn(2, 4, 8, 8, generator=random), torch.tensor([10, 900]), told)


def gradients(module: LoRAModule) -> dict[str, Tensor]:
    """Gradients of the adapter, with B set to something so that A's are not 0."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    output_of(module).square().mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "layer", "share"), [("nf4", Linear4bit, 0.16), ("int8", Linear8bitLt, 0.27)])
def test_quantised_layers_take_less_and_answer_alike(kind: Any, layer: type, share: float) -> None:
    plain = LoRAModule(BUILTIN, LoRA(rank=4))
    held = LoRAModule(BUILTIN, LoRA(rank=4), memory=Memory(quantization=kind))
    linear = [name for name, part in load_model(BUILTIN).network.named_modules() if type(part) is nn.Linear]
    weights = dict(held.model.network.named_modules())
    for name in linear:
        found: Any = weights.get(f"{name}.base_layer", weights[name])
        assert isinstance(found, layer), name
    before, after = (sum(bytes_of(w.get_submodule(n)) for n in linear) for w in (plain.model.network, weights[""]))
    adapter = sum(p.numel() * 4 for p in plain.parameters() if p.requires_grad)
    assert after - adapter < share * (before - adapter)
    with torch.no_grad():
        near, exact = output_of(held), output_of(plain)
    assert 0 < (near - exact).norm() / exact.norm() < (0.2 if kind == "nf4" else 0.03)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=4, type="dora", targets="attention")])
def test_adapters_beside_quantised_layers_are_trained_in_float32(kind: Any, lora: LoRA, tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), lora, memory=Memory(quantization=kind, dtype="bfloat16"))
    trained = module.trained_parameters()
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    found = gradients(module)
    assert len(found) == len(trained)
    assert all(value.abs().max() > 0 for value in found.values())


def test_quantised_weights_still_pass_gradients_after_an_evaluation(tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=4), memory=Memory(quantization="nf4"))
    module.eval()
    with torch.no_grad():
        output_of(module)
    module.train()
    assert all(value.abs().max() > 0 for value in gradients(module).values())


def test_quantise_of_a_text_encoder_that_is_adapted(tiny_base: Path) -> None:
    alone = LoRAModule(str(tiny_base), LoRA(rank=4), memory=Memory(quantization="nf4"))
    both = LoRAModule(str(tiny_base), LoRA(rank=4, text_encoder=True), memory=Memory(quantization="nf4"))
    for module, there in ((alone, False), (both, True)):
        parts = module.model.components()
        assert any(isinstance(part, Linear4bit) for part in parts["text_encoder"].modules()) == there
        assert not any(isinstance(part, Linear4bit) for part in parts["vae"].modules())


def test_dtype_is_of_the_frozen_network_and_text_encoder(tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=4), memory=Memory(dtype="bfloat16"))
    for name, parameter in module.model.named_parameters():
        exact = name.startswith("vae.") or parameter.requires_grad
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert output_of(module).dtype == torch.float32


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between the passes of what `run` returns."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = LoRAModule(str(tiny_base), LoRA(rank=4, targets="all"))
    torch.manual_seed(0)
    again = LoRAModule(str(tiny_base), LoRA(rank=4, targets="all"), memory=Memory(gradient_checkpointing=True))
    calls: list[int] = []
    original = checkpoint.checkpoint
    monkeypatch.setattr(checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    whole = saved_bytes(lambda: output_of(plain))
    assert not calls
    assert saved_bytes(lambda: output_of(again)) < 0.5 * whole
    assert len(calls) > 5
    first, second = gradients(plain), gradients(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_of_a_trained_text_encoder(tiny_base: Path) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=4, text_encoder=True), memory=Memory(gradient_checkpointing=True))
    assert module.model.components()["text_encoder"].is_gradient_checkpointing
    assert any("text_encoder" in name and value.abs().max() > 0 for name, value in gradients(module).items())


@pytest.mark.parametrize("chunks", [1, 2])
def test_plain_attention_answers_as_the_fused_kernel(tiny_base: Path, chunks: int) -> None:
    found = []
    for attention in ("sdpa", "plain"):
        torch.manual_seed(0)
        memory = Memory(attention=attention)  # type: ignore[arg-type]
        module = LoRAModule(str(tiny_base), LoRA(rank=4), memory=memory, prompts=Prompts(chunks=chunks))
        names = {type(one).__name__ for one in module.model.network.attn_processors.values()}
        assert names == {"PlainAttention" if attention == "plain" else "AttnProcessor2_0"}
        found.append(gradients(module))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_plain_attention_is_refused_where_layers_do_more() -> None:
    family = PixelDDPM(size=16, channels=(16, 16), attention_from=1)
    with pytest.raises(ValueError, match=r"memory.attention is plain: only for Stable Diffusion"):
        DiffusionModule(architecture=family, memory=Memory(attention="plain"))


@pytest.mark.parametrize("last", [True, False])
def test_channels_last(tiny_base: Path, last: bool) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=4, targets="all"), memory=Memory(channels_last=last))
    layer = module.model.network.down_blocks[0].resnets[0].conv1
    for weight in (layer.base_layer.weight, layer.lora_A["default"].weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_compile_takes_training_steps_alone_and_only_whole_batches(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    original = torch.compile

    def compile(made: Any, **words: Any) -> Any:
        assert words == {"dynamic": False}
        through = original(made, **words, backend="eager")
        return lambda x, *a, **k: (taken.append(len(x)), through(x, *a, **k))[1]

    monkeypatch.setattr(torch, "compile", compile)
    plain = LoRAModule(str(tiny_base), LoRA(rank=4))
    module = LoRAModule(str(tiny_base), LoRA(rank=4), memory=Memory(compile=True))
    assert module.state_dict().keys() == plain.state_dict().keys()
    told = module.model.encode_prompts(["a disc"] * 4)

    def given(count: int) -> torch.Tensor:
        x_t = torch.ones(count, *module.model.latent_shape(16, 16))
        return module.model.denoise(x_t, torch.full((count,), 500), {"text": told["text"][:count]})

    for count in (2, 1, 4, 2, 4):
        given(count)
    assert taken == [2, 4, 4]
    with torch.no_grad():
        given(4)
    assert taken == [2, 4, 4]
    for name, value in plain.named_parameters():
        if "lora_" in name:
            value.data = torch.ones_like(value) / 50
    module.load_state_dict(plain.state_dict(), strict=False)
    expected = plain.model.denoise(torch.ones(4, *module.model.latent_shape(16, 16)), torch.full((4,), 500), told)
    assert torch.allclose(given(4), expected, atol=1e-5)


def small(recipe: Path, *more: str) -> list[str]:
    return ["fit", "-c", str(recipe), "--trainer.max_steps", "2", *more]


def test_release_drops_all_but_the_network(recipe: Path, tmp_path: Path) -> None:
    words = ("--model.memory.unload_encoders", "true", "--model.objective.caption_dropout", "0.5")
    cli = run_recipe(small(recipe, *words))
    parts = cli.model.model.components()
    assert isinstance(parts["vae"], Unloaded)
    assert isinstance(parts["text_encoder"], Unloaded)
    assert {name.split(".")[0] for name, _ in cli.model.model.named_parameters()} == {"unet"}
    kept = run_recipe(small(recipe, "--trainer.default_root_dir", str(tmp_path / "kept")))
    assert not any(isinstance(part, Unloaded) for part in kept.model.model.components().values())
    with pytest.raises(UserError, match="the text_encoder was unloaded when training began"):
        cli.model.model.encode_prompts(["a red disc"])


def test_release_changes_no_number(recipe: Path, tmp_path: Path) -> None:
    words = small(recipe, "--model.objective.caption_dropout", "0.5", "--export.dtype", "float32")
    written = []
    for name, more in (("kept", []), ("dropped", ["--model.memory.unload_encoders", "true"])):
        assert main([*words, "--trainer.default_root_dir", str(tmp_path / name), *more]) == 0
        written.append(load_file(tmp_path / name / "lora.safetensors"))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_released_parts_say_so(tiny_base: Path) -> None:
    family = load_model(str(tiny_base))
    shape = family.latent_shape(16, 16)
    unload_encoders(family)
    assert family.latent_shape(16, 16) == shape
    with pytest.raises(UserError, match=r"memory.unload_encoders is true: the vae was unloaded"):
        family.decode(torch.zeros(1, *shape))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_file_of_a_qlora_run_is_like_any_other(recipe: Path, tmp_path: Path, tiny_base: Path, kind: str) -> None:
    names = {}
    for name, more in (("plain", []), (kind, ["--model.memory.quantization", kind])):
        words = small(recipe, "--model.lora.targets", "all", "--trainer.default_root_dir", str(tmp_path / name), *more)
        assert main(words) == 0
        held = load_file(tmp_path / name / "lora.safetensors")
        names[name] = {key: (value.shape, value.dtype) for key, value in held.items()}
        assert any(value.abs().max() > 0 for key, value in held.items() if "lora_B" in key)
    assert names["plain"] == names[kind]
    words = ["--base", str(tiny_base), "--lora", str(tmp_path / kind / "lora.safetensors")]
    assert main(["merge", *words, "--out", str(tmp_path / "merged.safetensors")]) == 0


def test_quantise_counts_what_it_changed() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 32, bias=False), nn.Conv2d(1, 1, 1)))
    assert quantize(network, "nf4") == 2
    assert quantize(network, "nf4") == 0
    assert isinstance(network.get_submodule("1.1"), nn.Conv2d)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["memory.quantization", "nf4", "lora.init", "pissa"],
            "memory.quantization is nf4, but lora.init pissa changes W_0",
        ),
        (["memory.dtype", "bfloat16", "lora.init", "olora"], "memory.dtype is bfloat16, but lora.init olora"),
        (["memory.quantization", "int8", "lora.type", "loha"], "memory.quantization is int8: not with lora.type loha"),
        (
            ["memory.unload_encoders", "true", "lora.text_encoder", "true"],
            "memory.unload_encoders is true, but the text encoder is",
        ),
        (["memory.quantization", "nf3"], "'model.memory.quantization'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(
    recipe: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--model.{word}" if number % 2 == 0 else word for number, word in enumerate(words)]
    assert main(["fit", "-c", str(recipe), *given, "--export.format", "kohya", "--model.base", "nowhere"]) == 2
    assert expected in capsys.readouterr().err


def test_release_and_samples_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.memory.unload_encoders", "true", "--samples.every_n_steps", "5", "--model.base", "nowhere"]
    assert main(["fit", "-c", str(recipe), *words]) == 2
    assert "memory.unload_encoders is true, but samples.every_n_steps is 5" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [{"quantization": "nf4"}, {"dtype": "bfloat16"}, {"unload_encoders": True}])
def test_full_fine_tuning_refuses_what_is_for_a_frozen_base(memory: dict[str, Any]) -> None:
    model = {"class_path": "DiffusionModule", "init_args": {"base": "nowhere", "memory": memory}}
    with pytest.raises(UserError, match=r"^model\.memory\.(quantization|dtype|unload_encoders) is "):
        check(Recipe({"model": model}, "fit"))


def test_full_fine_tuning_with_checkpointing(tiny_base: Path) -> None:
    module = DiffusionModule(str(tiny_base), memory=Memory(gradient_checkpointing=True))
    assert module.model.network.is_gradient_checkpointing


def test_the_qlora_recipe_takes_two_steps_on_a_small_base(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent.parent / "recipes" / "sdxl-qlora.yaml"
    words = ["--model.base", str(tiny_base), "--data.path", str(images), "--data.resolution", "16"]
    words += ["--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator"]
    cli = run_recipe(["fit", "-c", str(recipe), *words, "cpu", "--data.cache_dir", str(tmp_path / "cache")])
    assert cli.trainer.global_step == 2
    assert type(cli.trainer.optimizers[0]).__name__ == "AdamW8bit"
    assert any(isinstance(part, Linear4bit) for part in cli.model.model.network.modules())
    assert (tmp_path / "run" / "lora.safetensors").is_file()
