"""Stable Diffusion 1.x and 2.x: AutoencoderKL, CLIP text, U-Net with cross-attention (Rombach 2022)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from loratune.errors import UserError
from loratune.families.autoencoder import LatentFamily
from loratune.families.family import Architecture, Condition, Configs, LoadedModel, Part
from loratune.families.layout_text import canonical_text_key, open_clip_layers, text_layers
from loratune.families.layout_unet import unet_layers
from loratune.families.layout_vae import canonical_vae_key, vae_layers
from loratune.families.layouts import Config, Shape
from loratune.families.processes import PREDICTION_TYPES, DDPMFamily

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextConfig, CLIPTokenizer

    from loratune.families.model import Model
    from loratune.families.prompts import Windows
    from loratune.formats.headers import Header

TOKENIZER = Path(__file__).parent.parent / "assets" / "clip-tokenizer"
SAVED_BY = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
POSITION_IDS = "embeddings.position_ids"
PADS = {"tokenizer": "<|endoftext|>"}
NOTHING = [None, None]
# What single files call the kinds of prediction, and what diffusers does.
STATED = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# What real files hold besides the weights, by the beginning of the key: schedules, averages, buffers, marks.
IGNORED = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "cond_stage_model.model.attn_mask",
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.text_projection",
    "cond_stage_model.transformer.text_projection",
    f"cond_stage_model.transformer.text_model.{POSITION_IDS}",
    "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.transformer.text_projection",
    f"conditioner.embedders.0.transformer.text_model.{POSITION_IDS}",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.logit_scale",
    "denoiser.",
    "embedding_manager.",
    "first_stage_model.loss.",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
    "v_pred",
    "ztsnr",
)
# Of SD 2.x: predicting v leaves it with a wider spread than predicting eps does. A rule that others use too.
SPREAD_KEY = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09
log = logging.getLogger(__name__)

UNET_PART = Part(
    "unet",
    "denoiser",
    "diffusers",
    "UNet2DConditionModel",
    UNET,
    unet_layers,
    block="unet",
    blocks=(("down_blocks", "down"), ("mid_block", "mid"), ("up_blocks", "up")),
    kohya=("lora_unet_", "lycoris_"),
    shards=("BasicTransformerBlock", "ResnetBlock2D"),
)
VAE_PART = Part(
    "vae", "vae", "diffusers", "AutoencoderKL", "first_stage_model.", vae_layers, canonical=canonical_vae_key
)
TEXT_PART = Part(
    "text_encoder",
    "text_encoder",
    "transformers",
    "CLIPTextModel",
    "cond_stage_model.transformer.",
    text_layers,
    block="te1",
    kohya=("lora_te_", "lora_te1_"),
    canonical=canonical_text_key,
)


class StableDiffusion(LatentFamily, DDPMFamily):
    """Stable Diffusion 1.x.

    A condition is `text` (B, 77 N, d) for N windows, and with several also `text_mask` (B, 77 N).
    """

    name = "sd1"
    title = "Stable Diffusion 1.x"
    parts: ClassVar[tuple[Part, ...]] = (UNET_PART, VAE_PART, TEXT_PART)
    pipeline = "StableDiffusionPipeline"
    model_index = MappingProxyType(
        {"requires_safety_checker": False, "safety_checker": NOTHING, "feature_extractor": NOTHING}
    )
    tokenizers = MappingProxyType(PADS)
    tokenizer_class = "CLIPTokenizer"
    configs = ("sd15", "sd15-inpainting")
    targets = MappingProxyType(
        {
            "cross-attention": r".*\battn2\.to_(q|k|v)",
            "attention": r".*\battn[12]\.to_(q|k|v|out\.0)",
            "attention+ff": r".*\b(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
        }
    )
    text_targets = r".*\bself_attn\.(q_proj|k_proj|v_proj|out_proj)"
    windows = True
    words_at: ClassVar[str] = "text_model.embeddings.token_embedding.weight"

    def fits(self, configs: Mapping[str, Config]) -> bool:
        """By the U-Net; SD 2.x has OpenCLIP's text encoder, by whose activation it is told where there is one."""
        if "unet" not in configs or configs["unet"].get("addition_embed_type") or "text_encoder_2" in configs:
            return False
        unet, text = configs["unet"], configs.get("text_encoder")
        is_sd2 = unet.get("use_linear_projection") if text is None else text.get("hidden_act") == "gelu"
        return bool(is_sd2) == (self.name == "sd2")

    def title_of(self, configs: Mapping[str, Config]) -> str:
        return f"{self.title}{' (inpainting)' if self._inpainting(configs) else ''}"

    def _inpainting(self, configs: Mapping[str, Config]) -> bool:
        """Whether the U-Net takes a mask and a masked image beside x_t."""
        return bool(configs["unet"].get("in_channels") == 9)

    def variant(self, configs: Mapping[str, Config]) -> str:
        return "inpainting" if self._inpainting(configs) else "text to image"

    def pipeline_of(self, configs: Mapping[str, Config]) -> str:
        return self.pipelines()[self._inpainting(configs)]

    def pipelines(self) -> tuple[str, ...]:
        return self.pipeline, self.pipeline.replace("Pipeline", "InpaintPipeline")

    def distinctive(self, configs: Mapping[str, Config]) -> dict[str, Shape]:
        unet, text = configs["unet"], configs["text_encoder"]
        return {
            CONV_IN: (unet["block_out_channels"][0], unet["in_channels"], 3, 3),
            f"{self.part('text_encoder').prefix}{self.words_at}": (text["vocab_size"], text["hidden_size"]),
        }

    def ignored(self, configs: Mapping[str, Config]) -> tuple[str, ...]:
        return IGNORED

    def stated(self, header: Header) -> dict[str, Any]:
        """By Stability's modelspec, or the empty tensors `v_pred` and `ztsnr` that SDXL files carry.

        With zero terminal SNR, sampling must start at the last step: trailing (Lin 2024).
        """
        schedule: dict[str, Any] = {}
        kind = "v" if "v_pred" in header.tensors else header.metadata.get("modelspec.prediction_type", "").lower()
        if kind in STATED:
            schedule["prediction_type"] = STATED[kind]
        if "ztsnr" in header.tensors:
            schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return schedule

    def modelspec(self, configs: Mapping[str, Config]) -> str:
        return "stable-diffusion-v1"

    def kohya_version(self, configs: Mapping[str, Config]) -> str:
        return "sd_v1"

    def prepare(self, model: LoadedModel) -> None:
        import torch

        super().prepare(model)
        model.network.to(memory_format=torch.channels_last)

    def load_tokenizer(self, path: Path, name: str) -> CLIPTokenizer:
        """The base's own, or CLIP's where it carries none."""
        from transformers import CLIPTokenizer

        if (path / name / "vocab.json").is_file():
            return CLIPTokenizer.from_pretrained(path / name)
        return CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=self.tokenizers[name])

    def write_tokenizer(self, folder: Path, name: str) -> None:
        (folder / name).mkdir()
        for file in TOKENIZER.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        settings = folder / name / "tokenizer_config.json"
        config = json.loads(settings.read_text()) | {"pad_token": self.tokenizers[name]}
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def text_parts(self, model: LoadedModel) -> dict[str, tuple[Any, Any]]:
        return {"text_encoder": (model.tokenizer, model.text_encoder)}

    def read(self, model: LoadedModel, captions: Sequence[str], part: str = "text_encoder") -> Windows:
        """Captions as the windows of a text encoder; what does not fit is named in a warning, once."""
        from loratune.families.prompts import windows

        tokenizer, encoder = self.text_parts(model)[part]
        rows = windows(captions, tokenizer, encoder.config.max_position_embeddings, model.prompts)
        for caption, lost in rows.cut.items():
            if caption not in model.warned:
                model.warned.add(caption)
                advice = "shorten it, or set prompts.chunks above"
                log.warning("prompt %r: cut before %r; %s %d", caption, lost, advice, model.prompts.chunks)
        return rows

    def encode_prompts(self, model: LoadedModel, captions: Sequence[str]) -> Condition:
        """`text`, the last hidden states; with several windows `text_mask` is true where a caption fills one."""
        read = self.read(model, captions)
        states = model.text_encoder(read.ids.to(model.device, non_blocking=True)).last_hidden_state.float()
        return self.joined(model, states, read)

    def joined(self, model: LoadedModel, states: Tensor, read: Windows) -> Condition:
        """The states of windows (M, 77, d), weighted and side by side."""
        from loratune.families.prompts import filled, join, weigh

        if model.prompts.weighting:
            states = weigh(states, read.weights)
        chunks = model.prompts.chunks
        condition = {"text": join(states, read.counts, chunks)}
        if chunks > 1:
            mask = filled(read.counts, chunks).repeat_interleave(states.shape[1], 1)
            condition["text_mask"] = mask.to(states.device, non_blocking=True)
        return condition

    def text_settings(self, model: LoadedModel) -> str:
        parts = [_encodes(tokenizer, encoder) for tokenizer, encoder in self.text_parts(model).values()]
        settings = {"family": type(self).__name__, "prompts": asdict(model.prompts), "parts": parts}
        return json.dumps(settings, sort_keys=True, default=str)

    def words(self, model: LoadedModel, caption: str) -> list[tuple[str, list[int]]]:
        from loratune.families.prompts import words_of

        pieces = model.tokenizer.convert_ids_to_tokens(model.tokenizer(caption).input_ids)[1:-1]
        window = model.text_encoder.config.max_position_embeddings - 1
        words = [(word, [at + 1 for at in places]) for word, places in words_of(pieces)]
        return [(word, places) for word, places in words if places[-1] < window]

    def denoise(self, model: LoadedModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = model.network(x_t.to(model.network.dtype), t, **self.network_kwargs(model, x_t, condition)).sample
        return cast("Tensor", output.float())

    def network_kwargs(self, model: LoadedModel, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the U-Net's call takes beside x_t and t."""
        arguments = {"encoder_hidden_states": condition["text"].to(model.network.dtype)}
        if "text_mask" in condition:
            arguments["encoder_attention_mask"] = condition["text_mask"]
        return arguments


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 2.x: OpenCLIP's text encoder without its last layer; eps at 512 pixels or v at 768."""

    name = "sd2"
    title = "Stable Diffusion 2.x"
    parts = (
        UNET_PART,
        VAE_PART,
        replace(TEXT_PART, prefix="cond_stage_model.model.", layers=open_clip_layers),
    )
    tokenizers = MappingProxyType({"tokenizer": "!"})  # OpenCLIP was trained with text padded by the token 0
    configs = ("sd2", "sd2-inpainting")
    words_at = "token_embedding.weight"

    def ignored(self, configs: Mapping[str, Config]) -> tuple[str, ...]:
        """The text encoder's last layer too, which is in the file and in no diffusers folder."""
        last = configs["text_encoder"]["num_hidden_layers"]
        return (*IGNORED, f"{self.part('text_encoder').prefix}transformer.resblocks.{last}.")

    def complete(self, configs: Configs, header: Header, values: Callable[[str], Any]) -> None:
        """What it predicts: eps, made for 512 pixels, or v, made for 768. One U-Net serves both.

        Where the header does not say which it is, its weights do.
        """
        if self._inpainting(configs):
            return
        if "prediction_type" not in self.stated(header):
            bias = values(SPREAD_KEY)
            if len(bias) and bias.std() > V_SPREAD:
                configs["scheduler"]["prediction_type"] = "v_prediction"
        if _is_v(configs):
            configs["unet"]["sample_size"] = 96

    def modelspec(self, configs: Mapping[str, Config]) -> str:
        return f"stable-diffusion-v2-{'768-v' if _is_v(configs) else '512'}"

    def kohya_version(self, configs: Mapping[str, Config]) -> str:
        return "sd_v2_v" if _is_v(configs) else "sd_v2"


def _is_v(configs: Mapping[str, Config]) -> bool:
    return bool(configs["scheduler"].get("prediction_type") == "v_prediction")


def _encodes(tokenizer: Any, encoder: Any) -> dict[str, Any]:
    """What decides beside the weights what a text encoder makes of a caption, wherever and by whatever it was saved."""
    config = {key: value for key, value in encoder.config.to_diff_dict().items() if key not in SAVED_BY}
    whole = tokenizer.backend_tokenizer.to_str()
    reads = whole[whole.index('"added_tokens"') :]  # before it: padding and truncation as the last call left them
    return {
        "encoder": config,
        "tokenizer": hashlib.sha256(reads.encode()).hexdigest(),
        "pad": tokenizer.pad_token_id,
    }


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder of some width and depth, with CLIP's window of 77 tokens."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass
class NewStableDiffusion(Architecture):
    """A U-Net and a CLIP text encoder with random weights around a VAE that was trained before.

    Args:
        vae: a diffusers folder with the VAE.
        channels: U-Net width at each resolution.
        heads: attention heads at each resolution.
        layers: residual and attention blocks at each resolution.
        text_encoder: a folder with a text encoder that was trained before; none makes a new one.
        text_width: width of the text encoder, and of cross-attention's keys and values.
        text_layers: depth of the text encoder.
        latent_size: side of the latents.
        prediction: what the network predicts.
        zero_terminal_snr: rescale the schedule so that the last step is pure noise (Lin 2024).
    """

    vae: Path
    channels: tuple[int, ...] = (64, 128, 160)
    heads: tuple[int, ...] = (2, 4, 5)
    layers: int = 1
    text_encoder: Path | None = None
    text_width: int = 128
    text_layers: int = 4
    latent_size: int = 16
    prediction: Literal["eps", "v", "x0"] = "v"
    zero_terminal_snr: bool = True

    def build(self) -> Model:
        """The model.

        Raises:
            UserError: there is no VAE, or the prediction makes no sense with the schedule.
        """
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        from loratune.families.model import Model

        if not (Path(self.vae) / "config.json").is_file():
            raise UserError(f"{self.vae}: no VAE here; train one with recipes/pretrain/vae.yaml first")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise UserError("zero_terminal_snr: pure noise tells an eps model nothing; use prediction: v")
        vae = AutoencoderKL.from_pretrained(self.vae, local_files_only=True, use_safetensors=True)
        unet = UNet2DConditionModel(
            sample_size=self.latent_size,
            in_channels=vae.config["latent_channels"],
            out_channels=vae.config["latent_channels"],
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=("CrossAttnDownBlock2D",) * len(self.channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(self.channels),
            attention_head_dim=self.heads,
            cross_attention_dim=self.text_width,
            norm_num_groups=min(32, self.channels[0] // 4),
        )
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        encoder = CLIPTextModel(text_config(tokenizer, self.text_width, self.text_layers))
        if self.text_encoder is not None:
            encoder = CLIPTextModel.from_pretrained(self.text_encoder, local_files_only=True, use_safetensors=True)
        scheduler = {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": PREDICTION_TYPES[self.prediction],
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
        }
        parts = {"unet": unet, "vae": vae, "text_encoder": encoder}
        return Model(StableDiffusion(), parts, scheduler, {"tokenizer": tokenizer}, source="new")
