"""ForgeModule: any Hugging Face causal language model as a LightningModule."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from forge_lightning.compression.container import is_compressed
from forge_lightning.compression.container import load as load_compressed
from forge_lightning.core.extras import require_extra
from forge_lightning.core.layers import block_list
from forge_lightning.core.protocols import SupportsTokenizer
from forge_lightning.core.token_loss import token_loss
from forge_lightning.core.tokens import IGNORED, has_vocabulary
from forge_lightning.models.adapters import (
    adapter_config,
    add_adapters,
    are_the_same,
    changes_base,
    frozen_names,
    merged,
    weights_sample,
    with_frozen,
    without_frozen,
)
from forge_lightning.models.optimizers import one_group, optimizer_config, weight_decay_groups
from forge_lightning.self_model.callback import SelfModel, second_head
from forge_lightning.self_model.head import SelfModelHead

_ALWAYS_KNOWN = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype"}
_WEIGHTS = (".safetensors", ".bin")
_OF_TOKENIZER = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")
"""Settings of ``model_kwargs`` that its tokenizer is loaded with too."""


class ForgeModule(LightningModule):
    """Train a Hugging Face causal language model, from pretrained weights or from a config.

    The model is built in ``configure_model``, so that making the module is cheap and FSDP2 can shard it. Batches are
    ``{"input_ids", "attention_mask", "labels": (B, T)}``, labels not shifted, -100 where no loss is taken.

    Steps return ``loss`` (mean over the batch's labelled tokens; accumulated batches weigh alike, whatever they hold),
    and per example ``example_loss`` (mean over its own), ``example_success`` (1 where every labelled token is the
    likeliest one), ``example_token_accuracy`` and ``example_log_likelihood`` (of all labelled tokens together),
    ``(B,)``, detached, NaN for an example without labels.
    Logs ``train/loss`` (of the task alone, whatever callbacks add), ``train/token_accuracy``; ``val/loss``,
    ``val/perplexity``, ``val/token_accuracy``, ``val/exact_match``; the same under ``test/``.

    Args:
        pretrained: Hub name or local folder to take weights and config from, also a folder of `forge-fit compress`.
            The data's ``tokenizer: auto`` is its tokenizer; training with another one is refused.
        config: Instead: a config for random weights, as ``{"model_type": "gpt2", "n_layer": 2, "n_embd": 128}``. The
            vocabulary size is the tokenizer's unless given.
        optimizer: Optimizer, from parameter groups.
        lr_scheduler: Learning-rate schedule, stepped after every optimizer step.
        group_weight_decay: Leave norms, biases and embeddings out of weight decay.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        compile: Compile the model with ``torch.compile``.
        dtype: Type of the weights of ``pretrained``: "float32", "bfloat16", "float16", or "auto" for that of the
            checkpoint. Most checkpoints hold bfloat16, in which small steps of an optimizer are rounded to nothing;
            train from float32 weights, and save time and memory by the Trainer's ``precision="bf16-mixed"``.
        peft: Train adapters in place of the weights, by the library `peft` (extra ``[peft]``): ``{"peft_type": "LORA",
            "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}``, or another of its types of weights. Checkpoints
            of ``pretrained`` weights then hold the adapters alone.
        model_kwargs: More for ``from_pretrained``, or ``from_config``, of transformers: ``{"revision": ...,
            "attn_implementation": ...}``.
        self_model: A head that predicts the model's own activations. The module brings the callback `SelfModel`, which
            adds the head's error to the training loss. A subclass that overrides ``configure_callbacks`` has to return
            those of ``super()`` too. Off by default, and not exported. Its settings: ``forge-fit fit
            --model=ForgeModule --model.self_model.help=SelfModelHead``.

    Raises:
        ValueError: If not exactly one of ``pretrained`` and ``config`` is given, ``config`` has no ``model_type``,
            or ``dtype`` is none of the four.
        MissingExtraError: If ``peft`` is given and not installed.
        MisconfigurationException: If the weights cannot be had, or model and tokenizer do not fit.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        group_weight_decay: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        peft: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        self_model: SelfModelHead | None = None,
    ) -> None:
        super().__init__()
        require_extra("transformers", "hf", f"`{type(self).__name__}`")
        if peft is not None:
            adapter_config(peft)
        self.peft = peft
        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise ValueError(f"`ForgeModule(dtype={dtype!r})` must be 'float32', 'bfloat16', 'float16' or 'auto'.")
        if (pretrained is None) == (config is None):
            raise ValueError("`ForgeModule` takes either `pretrained` or `config`, and one of them.")
        if config is not None and "model_type" not in config:
            raise ValueError(f"`ForgeModule(config={config!r})` must name its 'model_type', as in 'gpt2' or 'llama'.")
        self.pretrained = pretrained
        self.config = config
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.group_weight_decay = group_weight_decay
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_model = compile
        self.dtype_of_weights, self.model_kwargs = dtype, dict(model_kwargs or {})
        self.self_model_head = None if self_model is None or self_model.is_off else self_model
        self.fitted_temperature = math.nan
        self._is_compiled = False
        self.model: Any = None
        self.tokenizer: Any = None

    @property
    def pretrained_tokenizer(self) -> tuple[str, dict[str, Any]] | None:
        """Where the tokenizer of ``pretrained`` is, and options to load it with; ``None`` for a new model."""
        if self.pretrained is None:
            return None
        return self.pretrained, {key: value for key, value in self.model_kwargs.items() if key in _OF_TOKENIZER}

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        self.build(data.tokenizer if isinstance(data, SupportsTokenizer) else None)

    def build(self, tokenizer: Any = None) -> None:
        """Make the model and its metrics. For use without a Trainer; ``configure_model`` calls it otherwise.

        Args:
            tokenizer: Tokenizer of the data. Without one, ``config`` must give ``vocab_size``.
        """
        self.tokenizer = tokenizer
        self.model = self._pretrained_model() if self.config is None else self._new_model(self.config)
        vocab_size = self.model.config.vocab_size
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise MisconfigurationException(
                f"The tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {vocab_size}. Give the"
                " model the tokenizer it was made with, or leave `vocab_size` out of `config`."
            )
        if tokenizer is not None and self.pretrained is not None:
            self.refuse_other_tokenizer(tokenizer)
        if self.peft is not None:
            self.model = add_adapters(self.model, self.peft)
        self.model.train()  # `from_pretrained` leaves evaluation mode, and Lightning keeps what it finds
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.device_mesh is not None:
            _shard(self.model, self.device_mesh["data_parallel"])
        self._is_compiled = False
        self.metrics = nn.ModuleDict({f"{split}_metrics": _metrics(vocab_size) for split in ("val", "test")})

    def _pretrained_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        if self.pretrained is not None and is_compressed(self.pretrained):
            name = "float32" if self.dtype_of_weights == "auto" else self.dtype_of_weights
            options = {key: value for key, value in self.model_kwargs.items() if key == "attn_implementation"}
            return load_compressed(self.pretrained, getattr(torch, name), **options)
        try:
            return AutoModelForCausalLM.from_pretrained(self.pretrained, **self._transformers_options())
        except (OSError, ValueError) as error:
            raise _no_model(self.pretrained, str(error).splitlines()[0]) from None

    def _transformers_options(self) -> dict[str, Any]:
        """What the model is made with; one from a config has the Trainer's precision unless a ``dtype`` is set."""
        name = self.dtype_of_weights
        if name == "float32" and self.pretrained is None:
            return dict(self.model_kwargs)
        return {"dtype": name if name == "auto" else getattr(torch, name), **self.model_kwargs}

    def refuse_other_tokenizer(self, tokenizer: Any) -> None:
        """Raise if the data's tokens are not those that the weights know; warn where that may be meant.

        A checkpoint without a tokenizer leaves the choice to the user.
        """
        from transformers import AutoTokenizer

        assert self.pretrained_tokenizer is not None
        name, options = self.pretrained_tokenizer
        try:
            own = AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError):
            return
        if not has_vocabulary(own):
            return
        theirs, ours = own.get_vocab(), tokenizer.get_vocab()
        kept = sum(ours.get(token) == number for token, number in theirs.items())
        if kept == len(theirs):
            return  # with more tokens, perhaps
        found = (
            f"`ForgeModule(pretrained={self.pretrained!r})` has a tokenizer of {len(theirs):,} tokens, and the data's"
            f" ({tokenizer.name_or_path or type(tokenizer).__name__}) has {len(ours):,}, of which {kept:,} are the same"
        )
        if kept < 0.9 * len(theirs):
            raise MisconfigurationException(
                f"{found}. The weights would see tokens that mean something else to them. Set `tokenizer: auto` in the"
                " data, which takes the model's own, or train a new model with `config`."
            )
        rank_zero_warn(f"{found}. Set `tokenizer: auto` in the data unless that is meant.")

    def _new_model(self, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        options = _with_tokenizer(options, self.tokenizer)
        if "vocab_size" not in options:
            raise MisconfigurationException("`ForgeModule(config=...)` needs 'vocab_size' where no tokenizer is known.")
        try:
            return AutoModelForCausalLM.from_config(hugging_face_config(options), **self._transformers_options())
        except ValueError as error:
            raise MisconfigurationException(f"`ForgeModule(config={self.config!r})`: {error}") from None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``(B, T)`` to logits of the next token at each position, ``(B, T, V)``."""
        if self.compile_model and not self._is_compiled:  # at the first call, when the hooks of callbacks are there
            self.model.compile()
            self._is_compiled = True
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if not self.compile_model:
            return self.model(**inputs).logits  # type: ignore[no-any-return]
        # Compiled code is shared among all models of a class, also with those that had no hooks.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self.model(**inputs).logits  # type: ignore[no-any-return]

    def _step(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Outputs, likeliest tokens and labels of a forward pass, each label at the position that predicts it."""
        length, context = batch["input_ids"].shape[1], context_length(self.model)
        if context is not None and length > context:
            raise MisconfigurationException(
                f"A batch is {length} tokens long, but the model has only {context} positions. Lower the data's length"
                " (`max_length`, `block_size`), or give the model more positions."
            )
        logits = self(batch["input_ids"], batch["attention_mask"])
        # Labels are shifted, as logits without the last position would be a copy of them all.
        target = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        losses, likeliest = (each[:, :-1] for each in token_loss(logits, target))
        target = target[:, :-1]
        labelled = target != IGNORED
        with torch.no_grad():
            count = labelled.sum(1)
            right = (likeliest == target) | ~labelled
            example_loss = torch.where(count > 0, losses.sum(1) / count, torch.nan)
            success = torch.where(count > 0, right.all(1).float(), torch.nan)
        outputs = {
            "loss": losses.sum() / labelled.sum().clamp(min=1),  # 0, and no gradient, without any label
            "example_loss": example_loss.detach(),
            "example_success": success,
            "example_token_accuracy": torch.where(count > 0, 1 - (~right).sum(1) / count, torch.nan),
            "example_log_likelihood": torch.where(count > 0, -losses.sum(1), torch.nan).detach(),
        }
        return outputs, likeliest, target

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs, likeliest, target = self._step(batch)
        count = (target != IGNORED).sum()
        loss = torch.where(count > 0, outputs["loss"].detach(), torch.nan)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/token_accuracy", (likeliest == target).sum() / count)
        return outputs

    def configure_callbacks(self) -> list[Callback]:
        """`SelfModel`, where ``self_model`` is given."""
        if self.self_model_head is None:
            return []
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, SelfModel) and callback.given_head is None and not callback.is_off:
                raise second_head(type(self).__name__)
        return [SelfModel.of_head(self.self_model_head, root="model")]

    def on_fit_start(self) -> None:
        if self.self_model_head is not None and not self.self_model_head.targets:
            raise MisconfigurationException(
                f"`{type(self).__name__}(self_model=...)`: its callback `SelfModel` is missing. A subclass that"
                " overrides `configure_callbacks` has to return those of `super().configure_callbacks()` too."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fitted_temperature"] = self.fitted_temperature
        if self._leaves_out_frozen and "state_dict" in checkpoint:
            names = frozen_names(self, "model.")
            checkpoint["state_dict"] = without_frozen(checkpoint["state_dict"], names)
            checkpoint["frozen_weights"] = {"of": self.pretrained, "sample": weights_sample(self, names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.fitted_temperature = checkpoint.get("fitted_temperature", math.nan)
        before = checkpoint.get("frozen_weights")
        if before is None or self.model is None:
            return
        names = frozen_names(self, "model.")
        if not are_the_same(before["sample"], weights_sample(self, names)):
            raise MisconfigurationException(
                f"The checkpoint holds adapters to the weights of {before['of']!r}, and those of"
                f" `ForgeModule(pretrained={self.pretrained!r})` are others. Name the weights that it was trained on."
            )
        checkpoint["state_dict"] = with_frozen(self, checkpoint["state_dict"], names)

    @property
    def _leaves_out_frozen(self) -> bool:
        """Whether checkpoints hold only what is trained: the rest is where it came from."""
        if self.peft is None or self.pretrained is None or self.device_mesh is not None:
            return False
        return not changes_base(self.peft)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "test")

    def _evaluation_step(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        outputs, likeliest, target = self._step(batch)
        metrics: Any = self.metrics[f"{split}_metrics"]
        num_labels = (target != IGNORED).sum()
        metrics["loss"].update(outputs["loss"], num_labels)
        metrics["perplexity"].update(outputs["loss"], num_labels)
        metrics["token_accuracy"].update(likeliest, target)
        success = outputs["example_success"]
        metrics["exact_match"].update(success.nan_to_num(), success.isfinite())
        for name, metric in metrics.items():
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "loss")
        return outputs

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        if self.tokenizer is None:
            raise MisconfigurationException("`ForgeModule.predict` needs a datamodule with a `tokenizer`.")
        prompts = []
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            prompts.append(self.tokenizer.decode(ids[(labels == IGNORED) & (mask == 1)], skip_special_tokens=True))
        return self.complete(prompts)

    def configure_optimizers(self) -> Any:
        params = weight_decay_groups(self) if self.group_weight_decay else one_group(self)
        steps = lambda: self.trainer.estimated_stepping_batches  # noqa: E731
        return optimizer_config(params, self.optimizer, self.lr_scheduler, steps)

    @torch.no_grad()
    def complete(
        self,
        prompts: list[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Continue prompts, each as if it were alone. The global random stream is left as it was.

        Settings of the model's ``generation_config``, as a repetition penalty, are left out; its end tokens end a text
        beside the tokenizer's.

        Args:
            prompts: Texts to continue.
            max_new_tokens: Tokens to add at most; fewer where the model's context ends.
            temperature: 0 takes the likeliest token each time; otherwise samples.
            top_p: Sample from the likeliest tokens whose probabilities add up to this, in (0, 1].
            seed: Random seed for the sampling. Of equal prompts, the second is sampled as one alone with ``seed + 1``,
                and so on.
            on_text: Called with each piece of text as it is made, of one prompt alone.

        Returns:
            The texts after each prompt. Empty for a prompt that fills the model's context.

        Raises:
            ValueError: If ``max_new_tokens`` is below 1, ``temperature`` below 0, ``top_p`` not in (0, 1], or
                ``on_text`` is given for several prompts.
        """
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens={max_new_tokens}` must be at least 1.")
        if temperature < 0:
            raise ValueError(f"`temperature={temperature}` must be at least 0.")
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p={top_p}` must be in (0, 1].")
        if on_text is not None and len(prompts) != 1:
            raise ValueError(f"`on_text` takes one prompt, not {len(prompts)}.")
        from forge_lightning.models.generation import Sampling, generate

        modes = [(part, part.training) for part in self.model.modules()]  # a frozen part may be in evaluation mode
        self.model.eval()
        try:
            sampling = Sampling(max_new_tokens, temperature, top_p, seed)
            return generate(self.model, self.tokenizer, prompts, sampling, on_text)
        finally:
            for part, mode in modes:
                part.training = mode

    def export(self, folder: str | Path, adapter: bool = False) -> None:
        """Write model and tokenizer as a Hugging Face folder, for ``from_pretrained``.

        Adapters of ``peft`` are added into the weights, unless ``adapter`` asks for them alone.

        A temperature that `Calibration` has fitted is ``fitted_temperature`` in config.json: logits divided by it are
        calibrated. Generation is left as it is, because the temperature for sampling is another matter.
        """
        if math.isfinite(self.fitted_temperature):
            self.model.config.fitted_temperature = self.fitted_temperature
        if Path(folder).is_file():
            raise MisconfigurationException(f"`{folder}` is a file. Name a folder to export to.")
        if adapter and self.peft is None:
            raise MisconfigurationException("There is no adapter to export: `ForgeModule(peft=...)` trains one.")
        model = merged(self.model) if self.peft is not None and not adapter else self.model
        model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def hugging_face_config(options: dict[str, Any]) -> Any:
    """A model's config, of ``model_type`` and settings that it knows.

    Raises:
        MisconfigurationException: If the type or a setting is unknown, naming close ones; transformers takes any.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    options = dict(options)
    model_type = options.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        close = get_close_matches(str(model_type), list(CONFIG_MAPPING)) or ["gpt2", "llama", "qwen2"]
        raise MisconfigurationException(f"`model_type={model_type!r}` is unknown to transformers. Close: {close}.")
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map, *_ALWAYS_KNOWN}
    for name in options:
        if name not in known:
            close = get_close_matches(name, sorted(known))
            raise MisconfigurationException(f"A {model_type} config has no {name!r}. Close: {close or sorted(known)}.")
    try:
        return AutoConfig.for_model(model_type, **options)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise MisconfigurationException(f"A {model_type} config of {options}: {error.__cause__ or error}") from error


def _with_tokenizer(options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What a config leaves open and the tokenizer knows."""
    if tokenizer is None:
        return dict(options)
    known = {"vocab_size": len(tokenizer)}
    known |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return known | options


def refuse_config(options: dict[str, Any], tokenizer: Any = None) -> bool:
    """Raise what building the model would, without memory for its weights.

    Args:
        options: The ``config`` of `ForgeModule`.
        tokenizer: Tokenizer of the data, if known.

    Returns:
        Whether the model could be made; of one that needs its weights for that, nothing more is known.

    Raises:
        MisconfigurationException: If a setting is unknown, or the settings do not go together.
    """
    from transformers import AutoModelForCausalLM

    config = hugging_face_config(_with_tokenizer(options, tokenizer))
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "meta" in str(error):
            return False
        raise MisconfigurationException(f"`ForgeModule(config={options!r})`: {type(error).__name__}: {error}") from None
    return True


def refuse_pretrained(name: str, **options: Any) -> None:
    """Raise what building the model would, if there is no config by a hub name, or no config or weights in a folder.

    Args:
        name: The ``pretrained`` of `ForgeModule`.
        **options: Of the checkpoint, as ``revision``.

    Raises:
        MisconfigurationException: As said.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is None:  # of an adapter, transformers finds the model itself
            AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _no_model(name, str(error).splitlines()[0]) from None
    folder = Path(name, options.get("subfolder", ""))
    if folder.is_dir() and not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise _no_model(name, f"no file in the folder ends in {' or '.join(_WEIGHTS)}")


def _no_model(name: str | None, reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"`ForgeModule(pretrained={name!r})` is neither a local folder with a model nor to be had from the hub"
        f" ({reason}). Point `pretrained` to a folder that holds config.json and weights, or give `config` for random"
        " weights, which needs no file."
    )


def context_length(model: Any) -> int | None:
    """Positions that the model has, where it has a number of them."""
    length: int | None = getattr(model.config, "max_position_embeddings", None)
    return length


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks of a transformer."""
    found = block_list(model)
    if found is None:
        raise MisconfigurationException(f"{type(model).__name__} has no list of blocks (`nn.ModuleList`).")
    return found


def _shard(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class _Perplexity(MeanMetric):
    """The exponential of a mean loss. torchmetrics' own takes the logarithm of probabilities, inf where one is 0."""

    def compute(self) -> Tensor:
        mean: Tensor = super().compute()
        return mean.exp()


def _metrics(vocab_size: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "loss": MeanMetric(),
            "perplexity": _Perplexity(),
            "token_accuracy": MulticlassAccuracy(
                vocab_size, average="micro", ignore_index=IGNORED, validate_args=False
            ),
            "exact_match": MeanMetric(),
        }
    )
