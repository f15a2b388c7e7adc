"""What a recipe may say, validated before anything is loaded."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..checkpoint_code.settings import KernelFFNConfig, make_settings
from ..text.text_format import BosChoice, TextFormat


def describe_unknown_key(key: object, known: list[str]) -> str:
    """A sentence with the nearest of the ``known`` keys, or all of them if none is near."""
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown key {key!r}, {hint}"


CONVERSION_KEYS = ("layers", "allocate")
"""Keys of ``kernel_ffn`` that are arguments of the conversion, and no settings of a layer."""


class _Section(BaseModel):
    """Keys of a recipe that belong together. An unknown key is refused with the nearest one."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, values: object) -> object:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(describe_unknown_key(key, list(cls.model_fields)))
        return values


class Data(_Section):
    """The text that a distillation reads."""

    train: str | list[str]
    """.txt, .jsonl or .parquet files, or names of `datasets` (name, name:split or
    name:config:split)."""
    sequence_length: int = Field(256, ge=2)
    """Tokens per packed sequence."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    chat: bool = False
    """Read the text through the tokenizer's chat template: the ``messages`` of a row, or a line or
    a row's text as a user's turn."""
    bos: BosChoice = "auto"
    """Whether every sequence begins with the start token: as the tokenizer or the chat template
    does it, always, or never."""
    shuffle_buffer: int = Field(2048, ge=1)
    """Sequences among which the next one is drawn; 1 keeps the text's order."""
    validation: str | list[str] | None = None
    """Text that is held out, of the kinds that ``train`` may be: every stage's loss on it goes to
    metrics.jsonl in output_dir. Its teacher runs where the stage's is recorded."""
    validation_tokens: int = Field(16_384, ge=1)
    """Tokens of it to read, from its beginning; at least one sequence."""
    validate_every_tokens: int = Field(500_000, ge=1)
    """How often; and after the last step of a stage."""

    @property
    def text_format(self) -> TextFormat:
        """How the text is turned into token ids."""
        return TextFormat(self.text_field, self.chat, self.bos)

    @property
    def sources(self) -> list[str]:
        """The training text's sources, in order."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def validation_sources(self) -> list[str]:
        """The held-out text's sources, in order; none if it is not given."""
        if self.validation is None:
            return []
        return [self.validation] if isinstance(self.validation, str) else self.validation


class Stage(_Section):
    """A part of the training, with one objective."""

    name: Literal["layer-wise", "logits"]
    """layer-wise: every FFN regresses its teacher's output on the teacher's own inputs; logits: KL
    between the models' predictions."""
    tokens: int = Field(ge=1)
    """Budget, over all processes; rounded up to whole steps."""
    learning_rate: float = Field(gt=0)
    """Peak step as a share of each tensor's own root mean square at the start of the stage, so that
    longer prototypes take longer steps."""
    batch_size: int = Field(8, ge=1)
    """Sequences per process that are read at once."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients make one step: as one batch that many times as large, in the memory
    of one; ``tokens`` counts all of them. Thresholds and the price of write mass alone are of each
    batch by itself."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: orthogonalised momentum on matrices (torch.optim.Muon), AdamW on the rest; adamw: AdamW
    on everything."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises, before it falls to zero along a
    cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, on matrices."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm (logits)."""
    temperature: float = Field(1.0, gt=0)
    """Of both models' predictions inside the KL (logits)."""
    kl: float = Field(1.0, ge=0)
    """Weight of the KL (logits)."""
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on the text's own tokens (the next or the masked ones), added to
    the KL (logits)."""
    stored_logits: str | None = None
    """Folder that `hf-kernel-ffn record` has made: the teacher's likeliest tokens are read from it,
    the others count as one, and the teacher does not run (logits). None: it runs."""
    write_mass: float = Field(0.0, ge=0)
    """Weight of Σ|c_i|‖v_i‖ over the length of what is written, added to the loss: the price
    of contributions that cancel."""
    layers_at_once: int | None = Field(None, ge=1)
    """Converted layers trained together, one group after the other, each with the whole budget
    (layer-wise): fewer need less memory for gradients and optimiser state. None: all."""

    @model_validator(mode="after")
    def _logits_are_for_logits(self) -> Stage:
        if self.stored_logits is not None and self.name != "logits":
            raise ValueError(
                f"stored_logits {self.stored_logits!r} in a {self.name} stage: only logits stages "
                "read it; leave it out"
            )
        return self


class Lora(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(8, ge=1)
    """Of each adapter."""
    alpha: int = Field(16, ge=1)
    """What an adapter writes is multiplied by this over the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On what an adapter reads."""


class Recipe(_Section):
    """A distillation. Paths are relative to the current directory."""

    teacher: str
    """Local folder, .gguf file or hub id of the stock model."""
    student: str | None = None
    """Local folder of a converted model; None: the teacher is converted by ``kernel_ffn``."""
    trust_remote_code: bool = False
    """Allow code that the teacher's family or the student's own kernel file brings to run."""
    kernel_ffn: dict[str, Any] = Field(default_factory=dict)
    """Settings of KernelFFNConfig; ``layers`` (such as 0-5,7) if not all; and ``allocate``, whether
    the units that sparse maps keep are shared out over layers by cost. Without settings the teacher
    is converted as by `hf-kernel-ffn convert` without options."""
    data: Data
    stages: list[Stage] = Field(min_length=1)
    lora: Lora | None = None
    """Train the rest of the student too, by low-rank adapters (peft) that are merged at the end
    (logits)."""
    seed: int = 0
    output_dir: str
    """Where the finished student is written; new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights and the computation; the trained weights are float32 all the same."""
    calibration_tokens: int = Field(16_384, ge=256)
    """Tokens of the training text that the conversion reads."""
    save_every_tokens: int = Field(500_000, ge=1)
    """How often the state to resume from is written."""
    fused: Literal["auto", "always", "never"] = "auto"
    """Triton kernels for the student's readouts: auto, on a GPU where a trial finds them as exact
    and no slower; always, or an error."""
    shard: bool = False
    """Cut the student's FFNs, their gradients and optimiser state over the processes (FSDP2);
    otherwise each holds all of them."""
    skip_steps: int = Field(0, ge=0)
    """Steps with a loss or a gradient that is not finite to leave out, in all; the next one stops
    the run. distillation.json in output_dir says how many there were."""
    trackers: list[str] = Field(default_factory=list)
    """accelerate's trackers: tensorboard, wandb, …"""
    gradient_checkpointing: bool = False
    """Recompute activations of the student in the backward pass (logits)."""

    @field_validator("kernel_ffn")
    @classmethod
    def _settings_exist(cls, settings: dict[str, Any]) -> dict[str, Any]:
        allowed = [*CONVERSION_KEYS, *(f.name for f in fields(KernelFFNConfig))]
        for key in settings:
            if key not in allowed:
                raise ValueError(describe_unknown_key(key, allowed))
        if not isinstance(settings.get("allocate", False), bool):
            raise ValueError(f"found allocate {settings['allocate']!r}, expected true or false")
        layers = settings.get("layers")
        if isinstance(layers, (str, type(None))):
            return settings
        numbers = layers if isinstance(layers, list) else [layers]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"found layers {layers!r}, expected numbers and ranges such as 0-5,7")
        return {**settings, "layers": numbers}

    @model_validator(mode="after")
    def _sharding_goes_with(self) -> Recipe:
        if self.shard and self.lora is not None:
            raise ValueError("shard with lora: only the FFNs can be sharded; leave one out")
        return self

    def kernel_settings(self) -> KernelFFNConfig:
        """``kernel_ffn`` without :data:`CONVERSION_KEYS`; a kernel given as FILE.py:NAME is
        registered.

        Raises:
            InputError: the combination is refused, or the kernel's file cannot be run.
        """
        from ..storage.kernel_files import import_kernel

        settings = dict(self.kernel_ffn)
        for key in CONVERSION_KEYS:
            settings.pop(key, None)
        if isinstance(settings.get("kernel"), str):
            settings["kernel"] = import_kernel(settings["kernel"])
        return make_settings(settings)
